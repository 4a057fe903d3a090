"""Damaged traces, spans and Jaeger files: said with file, place and field, or left out; no traceback."""

import io
import json
import logging
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from otlp_samples import REQUESTS, TRACE, otlp, span
from rich.console import Console
from typer.testing import CliRunner

from dualpath_sgl.evals.agents.subset import write_subset
from dualpath_sgl.evals.agents.trace import (
    Sharing,
    TraceRequest,
    TraceSession,
    load_session,
    load_sessions,
    shared_blocks,
    sharings,
)
from dualpath_sgl.evals.agents.workload import build
from dualpath_sgl.evals.cli import eval_app
from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.compare import run
from dualpath_sgl.evals.compare.summary import ByRole, ModeResult, PathCounts, Quantiles, WorkloadInfo
from dualpath_sgl.evals.spans import jaeger, traces, waterfall
from dualpath_sgl.evals.spans.requests import list_requests

SESSION = {"id": "s", "block_size": 4, "requests": [{"in": 8, "out": 2, "hash_ids": [1, 2]}]}
TEXT = json.dumps(SESSION)
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.case("loaders_bad_files")
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (TEXT.replace('"in": 8', '"in": 1' + "0" * 5000), "not JSON"),
        (TEXT.replace('"in": 8', '"in": 1' + "0" * 200), "field requests.0.in"),
        (DEEP, "not JSON"),
        ("[" * 2000, "not JSON"),
        (TEXT.replace('"id"', '"di"'), "field id is missing"),
        (TEXT.replace('"s"', '"a\\nb"'), "field id"),
        (TEXT.replace('"s"', '"\\ud800"'), "not JSON"),
        (TEXT.replace("[1, 2]", "[" * 400 + "]" * 400), "field requests.0.hash_ids"),
        (TEXT.replace("8", "NaN"), "not JSON"),
        (TEXT.replace("8", "1e400"), "not JSON"),
        (TEXT.encode("utf-16"), "not JSON"),
        (b"\xff", "not JSON"),
    ],
)
def test_a_damaged_trace_is_refused_with_file_and_field(tmp_path, content, said):
    file = tmp_path / "t.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(EvalError) as refusal:
        load_session(file)
    message = str(refusal.value)
    assert message.startswith(f"{file}: ") and said in message and len(message) < 500


def test_sub_agents_within_sub_agents_are_read_however_deep(tmp_path):
    requests = SESSION["requests"]
    for _ in range(300):
        requests = [{"type": "subagent", "requests": requests}]
    file = tmp_path / "t.json"
    file.write_text(json.dumps(SESSION | {"requests": requests}))
    assert len(load_session(file).requests) == 1


def test_paths_that_the_system_refuses_are_no_traceback(tmp_path):
    for path in (tmp_path / ("x" * 5000), tmp_path / "absent", tmp_path / ("x" * 300)):
        with pytest.raises(EvalError):
            load_sessions(path)
    with pytest.raises(EvalError, match="cannot be read"):
        load_session(tmp_path)


GOOD = span("b" * 16, "x", 1, 2)


def line(*spans) -> str:
    return json.dumps(otlp("s", *spans))


BROKEN_LINES = {
    "an array": "[]",
    "a number": "5",
    "null": "null",
    "half a line": line(GOOD)[:-20],
    "deep": '{"a":' + "[" * 5000 + "]" * 5000 + "}",
    "a long int": '{"a":' + "1" * 5000 + "}",
    "not UTF-8": b"\xff\xfe" + line(GOOD).encode(),
    "UTF-16": line(GOOD).encode("utf-16"),
    "no list": '{"resourceSpans": {"a": 1}}',
    "a resource of text": '{"resourceSpans": ["x"]}',
}
BROKEN_SPANS = {
    "no object": 5,
    "no traceId": {key: value for key, value in GOOD.items() if key != "traceId"},
    "a number as id": GOOD | {"spanId": 7},
    "no end": {key: value for key, value in GOOD.items() if key != "endTimeUnixNano"},
    "a time of text": GOOD | {"startTimeUnixNano": "soon"},
    "a time of null": GOOD | {"startTimeUnixNano": None},
    "a negative time": GOOD | {"startTimeUnixNano": -1},
    "a huge time": GOOD | {"endTimeUnixNano": "9" * 4000},
    "an attribute without key": GOOD | {"attributes": [{"value": {}}]},
    "an int of text": GOOD | {"attributes": [{"key": "k", "value": {"intValue": "x"}}]},
    "a list of text": GOOD | {"attributes": [{"key": "k", "value": {"arrayValue": 5}}]},
    "a link without ids": GOOD | {"links": [{}]},
    "an event without time": GOOD | {"events": [{"name": "e"}]},
    "a name with half a character": GOOD | {"name": "\ud800"},
    "a status of text": GOOD | {"status": "bad"},
}


@pytest.mark.case("loaders_bad_files")
@pytest.mark.parametrize("broken", [*BROKEN_LINES.values(), *map(line, BROKEN_SPANS.values())])
def test_a_broken_line_costs_itself_and_is_named(tmp_path, broken):
    file, out, skipped = tmp_path / "spans.jsonl", tmp_path / "out.json", []
    good = line(GOOD).encode()
    file.write_bytes(
        good + b"\n\n" + (broken if isinstance(broken, bytes) else broken.encode()) + b"\n" + good + b"\n"
    )
    assert jaeger.convert([file], out, skipped) == 1
    assert skipped and all(said.startswith(f"{file}: line ") for said in skipped)
    (trace,) = json.loads(out.read_text())["data"]
    assert len(trace["spans"]) == 1


def test_a_broken_span_costs_no_other_span_of_its_line(tmp_path):
    file, skipped = tmp_path / "spans.jsonl", []
    file.write_text(line(BROKEN_SPANS["a time of text"], GOOD))
    assert jaeger.convert([file], tmp_path / "out.json", skipped) == 1
    (said,) = skipped
    assert "line 1: field resourceSpans.0.scopeSpans.0.spans.0.startTimeUnixNano" in said and "soon" in said


def test_what_is_left_out_is_in_the_log_where_nobody_counts_it(tmp_path, caplog):
    file = tmp_path / "spans.jsonl"
    file.write_text("{\n")
    with caplog.at_level(logging.WARNING):
        assert jaeger.traces(jaeger.read_lines(file)) == []
    assert "1 broken lines" in caplog.text and "line 1" in caplog.text


def test_strange_but_whole_spans_become_json_that_jaeger_can_read(tmp_path):
    nested = {"stringValue": "x"}
    for _ in range(100):
        nested = {"arrayValue": {"values": [nested]}}
    attributes = [
        {"key": "nan", "value": {"doubleValue": "NaN"}},
        {"key": "nested", "value": nested},
        {"key": "nothing"},
    ]
    file, skipped = tmp_path / "spans.jsonl", []
    file.write_text(line(GOOD | {"attributes": attributes, "kind": "SPAN_KIND_CLIENT", "links": None}))
    jaeger.convert([file], tmp_path / "out.json", skipped)
    text = (tmp_path / "out.json").read_text()
    assert skipped == [] and "NaN" not in text.replace('"nan"', "") and len(text) < 5000


SEEN = {
    "traceID": TRACE,
    "spanID": "b",
    "operationName": "x",
    "startTime": 1,
    "duration": 1,
    "processID": "p1",
    "references": [],
    "tags": [],
    "logs": [],
}


def jaeger_file(folder, *spans, processes=None):
    file = folder / "traces.json"
    processes = {"p1": {"serviceName": "s"}} if processes is None else processes
    file.write_text(json.dumps({"data": [{"traceID": TRACE, "spans": spans, "processes": processes}]}))
    return file


def child_of(parent: str, trace: str = TRACE) -> dict:
    return {"references": [{"refType": "CHILD_OF", "traceID": trace, "spanID": parent}]}


def shown(file) -> str:
    """The list and the waterfall of the only trace."""
    console = Console(width=120, record=True, file=io.StringIO())
    found = traces.read_traces(file)
    list_requests(found, console, everything=True)
    waterfall.show(traces.find(found, TRACE), console)
    return console.export_text()


@pytest.mark.case("loaders_bad_files")
@pytest.mark.parametrize(
    "spans",
    [
        [SEEN | {"operationName": "one"} | child_of("elsewhere", "f" * 32)],
        [SEEN | {"operationName": "one"} | child_of("b")],
        [
            SEEN | {"operationName": "one"} | child_of("c"),
            SEEN | {"spanID": "c", "operationName": "two"} | child_of("b"),
        ],
        [
            SEEN | {"operationName": "one"},
            SEEN | {"spanID": "c", "operationName": "two"} | child_of("d"),
            SEEN | {"spanID": "d", "operationName": "three"} | child_of("c"),
            SEEN | {"spanID": "e", "operationName": "four"} | child_of("d"),
        ],
        [SEEN | {"operationName": "one"}, SEEN | {"operationName": "two"}],
        [SEEN | {"operationName": "one", "processID": "zz"}],
        [SEEN | {"operationName": "one", "startTime": "1"}],
        [{"spanID": "b", "operationName": "one", "startTime": 0}],
    ],
)
def test_every_span_is_shown_whoever_its_parent_is(tmp_path, spans):
    text = shown(jaeger_file(tmp_path, *spans))
    for wanted in spans:
        assert text.count(wanted["operationName"]) >= 1


def test_a_long_chain_of_spans_is_shown(tmp_path):
    chain = [SEEN | {"spanID": str(n), "operationName": f"n{n}."} | child_of(str(n - 1)) for n in range(3000)]
    assert "n2999." in shown(jaeger_file(tmp_path, *chain))


@pytest.mark.case("loaders_bad_files")
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"data": [{"traceID": TRACE, "spans": []}]}, "data.0.spans"),
        ({"data": [{"spans": [SEEN]}]}, "field data.0.traceID is missing"),
        ({"data": [5]}, "data.0"),
        ({"data": [{"traceID": TRACE, "spans": [SEEN | {"startTime": "soon"}]}]}, "data.0.spans.0.startTime"),
        ({"data": [{"traceID": TRACE, "spans": [SEEN | {"duration": 10**30}]}]}, "data.0.spans.0.duration"),
        ({"data": [{"traceID": TRACE, "spans": [SEEN | {"tags": "x"}]}]}, "data.0.spans.0.tags"),
        ({"data": {}}, "field data is missing"),
        ([], "field data is missing"),
    ],
)
def test_a_damaged_jaeger_file_is_refused_with_file_field_and_remedy(tmp_path, content, said):
    file = tmp_path / "traces.json"
    file.write_text(json.dumps(content))
    with pytest.raises(EvalError) as refusal:
        traces.read_traces(file)
    assert str(refusal.value).startswith(f"{file}: ") and said in str(refusal.value)
    assert "--file" in str(refusal.value)


@pytest.mark.case("trace_subset_ids")
@pytest.mark.parametrize(
    "ids",
    [["../../escaped", "/tmp/absolute"], ["same", "same", "Same"], ["..", "."], ["a/b", "a_b"], ["é" * 200]],
)
def test_every_session_of_a_subset_has_a_file_of_its_own_in_the_folder(tmp_path, ids):
    out, files = tmp_path / "a" / "out", []
    for number, session_id in enumerate(ids):
        files.append(tmp_path / f"{number}.trace")
        files[-1].write_text(json.dumps(SESSION | {"id": session_id}))
    before = set(tmp_path.rglob("*"))
    written = write_subset(files, out, 1)
    made = {path for path in set(tmp_path.rglob("*")) - before if path.is_file()}
    assert set(written) == made and len(made) == len(ids)
    assert all(path.parent == out for path in made)
    assert [load_session(path).id for path in written] == ids


def test_a_subset_never_writes_over_a_file(tmp_path):
    file = tmp_path / "s.trace"
    file.write_text(TEXT)
    out = tmp_path / "out"
    write_subset([file], out, 1)
    with pytest.raises(EvalError, match="exists already"):
        write_subset([file], out, 1)
    failed = CliRunner().invoke(eval_app, ["trace-subset", str(file), "--out", str(file), "--requests", "1"])
    assert failed.exit_code == 2 and isinstance(failed.exception, SystemExit)


def test_agents_of_sessions_with_one_id_are_told_apart(tmp_path):
    other = SESSION["requests"] + [{"in": 12, "out": 2, "hash_ids": [1, 2, 3]}]
    sessions = [
        TraceSession.model_validate(document)
        for document in (SESSION, SESSION | {"requests": other}, SESSION | {"id": "s#1"})
    ]
    workload = build(sessions, agents=6, turns=None, max_context_tokens=1024, page_size=4)
    names = [session.id for session in workload.sessions]
    assert len(set(names)) == 6 and names[:3] == ["s", "s~2", "s#1"]


def naive_sharings(session: TraceSession) -> list[Sharing | None]:
    """As the docstring of `sharings` says it, one pair after the other."""
    found = []
    for index, request in enumerate(session.requests):
        best = (0, False, -1)
        for earlier, candidate in enumerate(session.requests[:index]):
            blocks = shared_blocks(request.hash_ids, candidate.hash_ids)
            contained = blocks == len(candidate.hash_ids) and request.prompt_tokens > candidate.prompt_tokens
            best = max(best, (blocks, contained, earlier))
        found.append(Sharing(best[2], best[0], best[1]) if best[0] else None)
    return found


@st.composite
def prompts(draw):
    ids = draw(st.lists(st.integers(1, 2), max_size=6))
    whole = len(ids) * 2
    tokens = draw(st.integers(max(1, whole - 1), whole + 1))
    return TraceRequest.model_validate({"in": tokens, "out": 1, "hash_ids": ids})


@given(st.lists(prompts(), min_size=1, max_size=12))
def test_sharings_are_those_of_comparing_every_pair(requests):
    session = TraceSession.model_construct(id="s", block_size=2, requests=tuple(requests))
    assert sharings(session) == naive_sharings(session)


def test_thousands_of_requests_that_share_little_are_compared_without_end_in_sight():
    requests = tuple(
        TraceRequest.model_construct(prompt_tokens=8, output_tokens=1, hash_ids=(1, number))
        for number in range(20_000)
    )
    begun_s = time.monotonic()
    found = sharings(TraceSession.model_construct(id="s", block_size=4, requests=requests))
    assert found[-1] == Sharing(19_998, 1, False)
    assert time.monotonic() - begun_s < 60  # every pair: five minutes


def result() -> ModeResult:
    second = Quantiles(p50=1, p99=1, mean=1)
    return ModeResult(
        mode="basic",
        cluster_mode="basic",
        policy=None,
        tokens_equal=True,
        mismatches=[],
        requests=1,
        sessions=1,
        job_s=1,
        ttft_s=second,
        ttst_s=second,
        tpot_s=second,
        e2e_s=second,
        hit_rate=0,
        engines={},
        store_read_bytes=ByRole(),
        forwarded_bytes=0,
        paths=PathCounts(),
        fallbacks={},
        duplicate_store_pages=None,
    )


@pytest.mark.case("loaders_bad_files")
@pytest.mark.parametrize(("content", "traces"), [(b"{\n", 0), (line(GOOD).encode() + b"\n{", 1), (None, 0)])
def test_a_finished_evaluation_has_its_summary_whatever_became_of_its_spans(
    tmp_path, monkeypatch, content, traces
):
    spans = tmp_path / "spans.jsonl"
    if content is not None:
        spans.write_bytes(content)
    session = TraceSession.model_validate(SESSION)
    workload = build([session], agents=1, turns=None, max_context_tokens=64, page_size=4)
    monkeypatch.setattr(run, "_check", lambda options: None)
    monkeypatch.setattr(run, "_workload", lambda options: workload)
    monkeypatch.setattr(run, "_describe", lambda options, workload: info())
    monkeypatch.setattr(run, "_reference", lambda *_: {})
    monkeypatch.setattr(run, "_run_mode", lambda *_: (result(), spans))
    options = run.EvalOptions(None, None, ("basic",), 1, 1, None, 64, 1, tmp_path / "out")
    console = Console(width=200, record=True, file=io.StringIO())
    run.evaluate(options, console)
    document = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert document["requests"] == 1 and document["traces"] == traces
    assert str(spans) in console.export_text()


def info() -> WorkloadInfo:
    return WorkloadInfo(
        source="x",
        sessions=1,
        requests=1,
        scale_factor=1,
        longest_tokens=8,
        prompt_tokens=8,
        output_tokens=2,
        raw_hit_rate=0,
        hit_rate=0,
        page_size=4,
        concurrency=1,
        seed=1,
    )


def test_the_samples_are_whole(tmp_path):
    file, skipped = tmp_path / "spans.jsonl", []
    file.write_text("".join(json.dumps(request) + "\n" for request in REQUESTS))
    assert jaeger.traces(jaeger.read_lines(file, skipped)) == jaeger.traces(REQUESTS)
    assert skipped == []
