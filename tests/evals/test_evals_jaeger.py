"""OTLP JSON lines become what Jaeger's UI opens."""

import json

import pytest
from otlp_samples import LOST, REQUESTS, ROOT, TRACE

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.spans import jaeger


def tags(converted: dict) -> dict:
    return {tag["key"]: (tag["type"], tag["value"]) for tag in converted["tags"]}


def test_spans_of_two_services_become_one_trace_with_parent_and_child(tmp_path):
    lines = tmp_path / "spans.jsonl"
    lines.write_text("".join(json.dumps(request) + "\n" for request in REQUESTS))
    assert jaeger.convert([lines], tmp_path / "traces.json") == 1

    (trace,) = json.loads((tmp_path / "traces.json").read_text())["data"]
    assert trace["traceID"] == TRACE
    root, child, _ = trace["spans"]
    assert (root["spanID"], root["operationName"], root["startTime"], root["duration"]) == (
        ROOT,
        "dualpath.request",
        1_000_000,
        100,
    )
    assert root["references"] == [] and tags(root)["span.kind"] == ("string", "client")
    assert child["references"] == [{"refType": "CHILD_OF", "traceID": TRACE, "spanID": ROOT}]
    services = {trace["processes"][span["processID"]]["serviceName"] for span in trace["spans"]}
    assert services == {"client", "prefill-0"}
    assert trace["processes"][child["processID"]]["tags"] == [{"key": "host", "type": "string", "value": "h"}]


def test_attributes_events_and_errors_keep_their_types():
    (trace,) = jaeger.traces(REQUESTS)
    child = trace["spans"][1]
    found = tags(child)
    assert (
        found["bytes"] == ("int64", 4096)
        and found["gbps"] == ("float64", 1.5)
        and found["ok"] == ("bool", True)
    )
    assert found["pages"] == ("string", "[1, 2]")
    assert found["error"] == ("bool", True) and found["otel.status_description"] == ("string", "short read")
    (log,) = child["logs"]
    assert log["timestamp"] == 1_000_020
    assert [(field["key"], field["value"]) for field in log["fields"]] == [("event", "batch"), ("n", 7)]


def test_a_span_whose_parent_is_missing_stays_a_root_with_a_warning():
    (trace,) = jaeger.traces(REQUESTS)
    orphan = trace["spans"][2]
    assert orphan["references"] == []
    assert orphan["warnings"] == [f"parent span {LOST} was not received"]
    assert tags(orphan)["warning"] == ("string", f"parent span {LOST} was not received")


def test_a_span_that_was_exported_twice_counts_once():
    (trace,) = jaeger.traces([*REQUESTS, *REQUESTS])
    assert len(trace["spans"]) == 3


def test_a_broken_line_is_left_out_and_named_and_a_missing_file_is_refused(tmp_path):
    lines = tmp_path / "spans.jsonl"
    lines.write_text(json.dumps(REQUESTS[0]) + "\n{broken\n" + json.dumps(REQUESTS[1]) + "\n")
    skipped = []
    assert jaeger.convert([lines], tmp_path / "out.json", skipped) == 1
    assert len(skipped) == 1 and skipped[0].startswith(f"{lines}: line 2: not JSON")
    (trace,) = json.loads((tmp_path / "out.json").read_text())["data"]
    assert len(trace["spans"]) == 3
    with pytest.raises(EvalError, match="no such file"):
        jaeger.convert([tmp_path / "absent"], tmp_path / "out.json")
