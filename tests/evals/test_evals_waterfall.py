"""The waterfall of one trace in the terminal."""

import io
import json

import pytest
from otlp_samples import REQUESTS, TRACE, otlp, span
from rich.console import Console
from typer.testing import CliRunner

from dualpath_sgl.evals.cli import trace_app
from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.spans import jaeger, waterfall

OTHER = "0af76519ffffffffffffffffffffffff"


@pytest.fixture
def traces():
    other = otlp("client", span("aaaaaaaaaaaaaaaa", "dualpath.request", 5, 9) | {"traceId": OTHER})
    planned = span("eeeeeeeeeeeeeeee", "plan", 1_000_001, 1_000_002, parentSpanId="00f067aa0ba902b7")
    planned["attributes"] = [{"key": "dualpath.path", "value": {"stringValue": "decode"}}]
    return jaeger.traces([*REQUESTS, otlp("scheduler", planned), other])


def printed(show, *arguments) -> list[str]:
    console = Console(width=160, record=True, file=io.StringIO())
    show(*arguments, console)
    return console.export_text().splitlines()


def test_each_span_has_a_line_with_service_offset_bar_and_key_attributes(traces):
    lines = printed(waterfall.show, waterfall.find(traces, TRACE))
    assert "4 spans  3 services  0.1 ms" in lines[0]
    request, plan, read, send = lines[2:]
    assert request.startswith("dualpath.request") and request.count("━") == waterfall.BAR_WIDTH
    assert plan.startswith("  plan") and "scheduler" in plan and "path=decode" in plan
    assert read.startswith("  storage.read") and "bytes=4096" in read and "pages=[1, 2]" in read
    assert read.count("━") == waterfall.BAR_WIDTH // 2 and "error=True" in read
    assert send.startswith("kv_send") and "was not received" in " ".join(lines)


def test_a_unique_beginning_finds_a_trace(traces):
    assert waterfall.find(traces, TRACE[:9])["traceID"] == TRACE
    assert waterfall.find(traces, OTHER.upper())["traceID"] == OTHER


def test_an_ambiguous_beginning_is_refused(traces):
    with pytest.raises(EvalError, match="fits 2 traces"):
        waterfall.find(traces, "0af7")


def test_a_wrong_id_names_near_matches(traces):
    with pytest.raises(EvalError, match=f"near: .*{TRACE}"):
        waterfall.find(traces, TRACE[:-3] + "000")
    with pytest.raises(EvalError, match="--list"):
        waterfall.find(traces, "zzzz")


def test_the_list_has_every_trace(traces):
    text = "\n".join(printed(waterfall.list_traces, traces))
    assert TRACE in text and OTHER in text


def test_the_command_prints_the_waterfall_and_explains_what_it_cannot_read(traces, tmp_path):
    file = tmp_path / "traces.json"
    file.write_text(json.dumps({"data": traces}))
    shown = CliRunner().invoke(trace_app, ["show", TRACE[:12], "--file", str(file)])
    assert shown.exit_code == 0, shown.output
    assert "storage.read" in shown.output
    file.write_text("{}")
    assert CliRunner().invoke(trace_app, ["show", TRACE, "--file", str(file)]).exit_code == 2
