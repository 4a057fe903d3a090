"""Request traces in the terminal: the list, the waterfall, the command."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from otlp_samples import CHILD, REQUESTS, ROOT, TRACE, otlp, span
from rich.console import Console
from typer.testing import CliRunner

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.spans import jaeger, waterfall
from dualpath_sgl.evals.spans.command import ids_for_the_shell, trace_app
from dualpath_sgl.evals.spans.requests import RequestFacts, list_requests
from dualpath_sgl.evals.spans.traces import find, parse, read_traces
from dualpath_sgl.terminal.units import duration

OTHER = "0af76519ffffffffffffffffffffffff"
DEMO = Path(__file__).parent / "demo_traces.json"
"""Of a run of `dualpath demo`: one split request, one of upstream, one that fell back, a probe; trimmed."""
WIDTHS = (80, 120, 200)


@pytest.fixture
def traces():
    other = otlp("client", span("aaaaaaaaaaaaaaaa", "dualpath.request", 5, 9) | {"traceId": OTHER})
    planned = span("eeeeeeeeeeeeeeee", "plan decode", 1_000_001, 1_000_002, parentSpanId="00f067aa0ba902b7")
    planned["attributes"] = [{"key": "dualpath.path", "value": {"stringValue": "decode"}}]
    return parse(jaeger.traces([*REQUESTS, otlp("scheduler", planned), other]))


@pytest.fixture(scope="module")
def demo():
    return read_traces(DEMO)


def the_split_one(demo):
    return next(trace for trace in demo if RequestFacts.of(trace).path == "split")


def printed(show, *arguments, width: int = 160, **options) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    show(*arguments, console, **options)
    return console.export_text().splitlines()


def called(*arguments: str, columns: str | None = None):
    """The command with its output in a pipe."""
    environment = {"COLUMNS": columns, "FORCE_COLOR": None, "TTY_COMPATIBLE": None}
    return CliRunner().invoke(trace_app, ["show", *arguments], env=environment)


def test_each_span_has_a_line_with_service_offset_bar_and_key_attributes(traces):
    lines = printed(waterfall.show, find(traces, TRACE))
    assert "4 spans  3 services" in lines[0] and "0.10 ms" in lines[1]
    request, plan, read, send = (line for line in lines if "━" in line)
    bar = request.count("━")
    assert request.startswith("request") and bar >= 32
    assert plan.startswith("├─plan") and "scheduler" in plan and "path decode" in plan
    assert read.startswith("└─store to prefill") and "error short read" in read
    assert read.count("━") == bar // 2 and "0.05 ms" in read
    assert send.startswith("kv_send") and "was not received" in send


def test_attributes_of_the_file_are_all_there_when_asked_for(traces):
    text = "\n".join(printed(waterfall.show, find(traces, TRACE), verbose=True))
    assert "bytes = 4096" in text and "pages = [1, 2]" in text and "error = True" in text
    assert "otel.status_description = short read" in text


@pytest.mark.parametrize("width", WIDTHS)
def test_a_split_request_is_readable_at_any_width(demo, width):
    lines = printed(waterfall.show, the_split_one(demo), width=width)
    assert max(map(len, lines)) <= width
    drawn = [line for line in lines if "━" in line]
    root, plan = drawn[0], next(line for line in drawn if "plan " in line)
    assert "path split" in root and "path split" in plan and "/" in plan
    ways = ("store to prefill", "store to decode", "decode to prefill")
    moved = [next(line for line in drawn if way in line) for way in ways]
    assert [line.split(way)[1].split()[0] for way, line in zip(ways, moved, strict=True)] == [
        "prefill-0", "decode-0", "prefill-0",
    ]  # fmt: skip
    for line in moved:
        assert " MB " in line and "MB/s" in line and "wait " in line, line


@pytest.mark.parametrize("width", WIDTHS)
def test_every_span_has_a_line_of_its_own_or_is_counted(demo, width):
    trace = the_split_one(demo)
    lines = printed(waterfall.show, trace, width=width)
    alone = sum("━" in line and "decode_loop x" not in line for line in lines)
    together = next(int(line.split(" x")[1].split()[0]) for line in lines if "decode_loop x" in line)
    hidden = int(lines[-1].split()[0])
    assert alone + together + hidden == len(trace.spans)
    every = printed(waterfall.show, trace, width=width, verbose=True)
    assert sum("━" in line for line in every) == len(trace.spans) and max(map(len, every)) <= width


def test_siblings_branch_off_the_span_that_they_belong_to(demo):
    lines = [line for line in printed(waterfall.show, the_split_one(demo)) if "━" in line]
    roots = [line for line in lines if not line.startswith(("├", "│", "└", " "))]
    assert len(roots) == 1
    level_one = [line for line in lines if line.startswith(("├─", "└─"))]
    assert [line[:2] for line in level_one] == ["├─"] * (len(level_one) - 1) + ["└─"]


def test_names_have_no_process_numbers_and_no_request_ids(demo):
    text = "\n".join(printed(waterfall.show, the_split_one(demo), width=200))
    assert "pid" not in text and "host" not in text and "[TP 0]" not in text


def load(name: str, span_id: str, begin_us: int, end_us: int, **attributes: int | str | float) -> dict:
    kinds = {int: "intValue", str: "stringValue", float: "doubleValue"}
    made = span(span_id, name, begin_us, end_us, parentSpanId=ROOT)
    values = {f"dualpath.{key.replace('__', '.')}": value for key, value in attributes.items()}
    made["attributes"] = [{"key": key, "value": {kinds[type(value)]: value}} for key, value in values.items()]
    return made


@pytest.fixture
def relayed():
    """Two calls of one request: three lanes bring the first one, nobody helps with the second."""
    first = load(
        "relay to prefill",
        CHILD,
        1_000_010,
        1_200_000,
        bytes=24_000_000,
        own__bytes=8_000_000,
        relay__bytes=16_000_000,
        **{"relay__bytes__relay-0": 12_000_000, "relay__bytes__relay-1": 4_000_000},
        bandwidth_bytes_per_s=120e6,
    )
    second = load(
        "own read to prefill",
        "b7ad6b7169203332",
        1_200_000,
        1_600_000,
        bytes=16_000_000,
        own__bytes=16_000_000,
        relay__bytes=0,
        bandwidth_bytes_per_s=40e6,
        fallback__reason="no relay answers",
    )
    fetch = span("b7ad6b7169203333", "store to relay", 1_000_020, 1_100_000, parentSpanId=CHILD)
    client = span(ROOT, "dualpath.request", 1_000_000, 2_000_000)
    return find(
        parse(
            jaeger.traces([otlp("client", client), otlp("prefill-0", first, second), otlp("relay-0", fetch)])
        ),
        TRACE,
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_a_request_whose_loads_relays_took_part_in_is_readable_at_any_width(relayed, width):
    lines = printed(waterfall.show, relayed, width=width)
    assert max(map(len, lines)) <= width
    assert "path relay" in lines[1]
    assert "40.0 MB read from the store  16.0 MB by relays" in lines[2]
    assert "fallback no relay answers" in lines[2]
    first, second = (line for line in lines if "to prefill" in line)
    assert "24.0 MB" in first and "120 MB/s" in first and "40.0 MB/s" in second
    if width > 80:
        assert "own 8.00 MB  relay-0 1" in first
        assert "fallback no relay" in second
    assert not any("store to relay" in line for line in lines)
    assert any(
        "store to relay" in line for line in printed(waterfall.show, relayed, width=width, verbose=True)
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_a_fallback_s_reason_is_told_at_any_width(demo, width):
    facts = next(facts for facts in map(RequestFacts.of, demo) if facts.fallbacks)
    lines = printed(waterfall.show, find(demo, facts.trace), width=width)
    told = f"fallback {facts.fallbacks[0]}"
    assert told in next(line for line in lines if "read from the store" in line)
    read = next(line for line in lines if "store to " in line)
    assert "MB/s" in read and (told[:16] in read or width == 80)


def test_a_unique_beginning_finds_a_trace(traces):
    assert find(traces, TRACE[:9]).traceID == TRACE
    assert find(traces, OTHER.upper()).traceID == OTHER


def test_an_ambiguous_beginning_is_refused(traces):
    with pytest.raises(EvalError, match="fits 2 traces"):
        find(traces, "0af7")


def test_a_wrong_id_names_near_matches(traces):
    with pytest.raises(EvalError, match=f"near: .*{TRACE}"):
        find(traces, TRACE[:-3] + "000")
    with pytest.raises(EvalError, match="--list"):
        find(traces, "zzzz")


def test_the_list_has_every_trace(traces):
    lines = printed(list_requests, traces)
    for trace_id in (TRACE, OTHER):
        shown = [line.split()[0] for line in lines if trace_id.startswith(line.split()[0])]
        assert len(shown) == 1 and find(traces, shown[0]).traceID == trace_id


@pytest.mark.parametrize("width", WIDTHS)
def test_the_list_shows_requests_with_room_path_tokens_and_time_and_no_probe(demo, width):
    facts = RequestFacts.of(the_split_one(demo))
    lines = printed(list_requests, demo, width=width)
    assert max(map(len, lines)) <= width
    line = next(line for line in lines if line.startswith(facts.trace[:8]))
    for part in (
        "split",
        facts.room,
        f"{facts.prompt_tokens}+{facts.output_tokens}",
        duration(facts.duration_s),
    ):
        assert part in line
    asked_for = [facts for facts in map(RequestFacts.of, demo) if facts.request]
    assert 0 < len(asked_for) < len(demo)
    assert len(lines) == 2 + len(asked_for) and "--all" in lines[-1]
    everything = printed(list_requests, demo, width=width, everything=True)
    assert len(everything) == 1 + len(demo)


def test_the_list_tells_the_modes_of_an_evaluation_apart(demo):
    lines = printed(list_requests, demo, width=120)
    assert {line.split()[1] for line in lines[1:-1]} == {"basic", "dualpath"}


@pytest.mark.parametrize(("columns", "width"), [("80", 80), ("200", 200), (None, 120)])
def test_a_pipe_gets_no_colours_and_a_fixed_width(demo, columns, width):
    split = the_split_one(demo).traceID
    result = called(split, "--file", str(DEMO), columns=columns)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert "\x1b" not in result.output
    assert width - 25 < max(map(len, lines)) <= width
    assert any("├" in line for line in lines)


def test_scripts_get_the_same_as_json(demo):
    split = the_split_one(demo).traceID
    one = json.loads(called(split[:12], "--file", str(DEMO), "--json").output)
    assert (one["trace"], one["path"], one["request"]) == (split, "split", True)
    assert one["store_read_bytes"] > one["forwarded_bytes"] > 0
    assert len(one["tree"]) == one["spans"] == len(the_split_one(demo).spans)
    ids = {span["id"] for span in one["tree"]}
    assert [span["name"] for span in one["tree"] if span["parent"] not in ids] == ["dualpath.request"]
    listed = json.loads(called("--list", "--file", str(DEMO), "--json").output)
    assert listed["file"] == str(DEMO) and all(facts["request"] for facts in listed["traces"])
    every = json.loads(called("--list", "--all", "--file", str(DEMO), "--json").output)
    assert len(every["traces"]) == len(demo) > len(listed["traces"])


def test_the_command_prints_the_waterfall_and_explains_what_it_cannot_read(tmp_path):
    documents = jaeger.traces(REQUESTS)
    file = tmp_path / "traces.json"
    file.write_text(json.dumps({"data": documents}))
    shown = called(TRACE[:12], "--file", str(file))
    assert shown.exit_code == 0, shown.output
    assert "store to prefill" in shown.output
    file.write_text("{}")
    assert called(TRACE, "--file", str(file)).exit_code == 2


def test_what_a_running_cluster_has_recorded_is_shown_too(tmp_path):
    (tmp_path / "spans.jsonl").write_text("".join(json.dumps(request) + "\n" for request in REQUESTS))
    for where in (("--run-dir", str(tmp_path)), ("--file", str(tmp_path / "spans.jsonl"))):
        shown = called(TRACE, *where)
        assert shown.exit_code == 0 and "store to prefill" in shown.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("1",), ["results/*/traces.json", "dualpath demo", "--file"]),
        (("1", "--file", "nothing.json"), ["nothing.json: no such file", "--file"]),
        (("1", "--file", "."), [".: cannot be read", "--file"]),
        (("1", "--run-dir", "nothing"), ["--run-dir nothing", "spans.jsonl", "tracing.enabled"]),
        (("1", "--run-dir", "a", "--file", "b"), ["--file and --run-dir", "one of them"]),
        ((), ["ID is missing", "--list"]),
    ],
)
def test_an_error_names_what_was_given_and_the_remedy(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    result = called(*arguments)
    assert result.exit_code == 2
    assert all(part in result.output for part in said), result.output


def test_the_shell_completes_trace_ids(demo, tmp_path, monkeypatch):
    split = the_split_one(demo).traceID
    context = SimpleNamespace(params={"file": DEMO, "run_dir": None})
    assert [found for found, _ in ids_for_the_shell(context, split[:4])] == [split]
    monkeypatch.chdir(tmp_path)
    assert ids_for_the_shell(SimpleNamespace(params={}), "") == []
