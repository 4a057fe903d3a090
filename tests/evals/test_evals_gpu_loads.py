"""Tables and stage times of load cells with known numbers."""

import json
from dataclasses import replace

import pytest
from otlp_samples import otlp, span

from dualpath_sgl.evals.gpu.goodput import PLAIN, Forward, Goodput, forwards
from dualpath_sgl.evals.gpu.loads import Cell, LoadPlan
from dualpath_sgl.evals.gpu.report import burst_limit, load_s, stage_times, tables
from dualpath_sgl.evals.spans import jaeger

PLAN = LoadPlan(lengths=(64, 128), repetitions=1, burst_requests=2, burst_tokens=64, burst_repetitions=1)


def cell(mode: str, load: str, tokens: int, *ttft_s: float, job_s: float = 1.0) -> Cell:
    return Cell(mode, load, tokens, job_s=[job_s] * len(ttft_s), ttft_s=[[time_s] for time_s in ttft_s])


def named(*cells: Cell) -> dict[str, Cell]:
    return {cell.name: cell for cell in cells}


def test_a_load_time_is_the_median_without_what_the_same_cluster_needs_when_nothing_is_loaded():
    cells = named(
        cell("dualpath", "held", 64, 0.5),
        cell("basic", "held", 64, 2.0),
        cell("split", "lone", 64, 9.0, 3.5, 3.0),
        cell("basic", "lone", 64, 8.0),
    )
    assert load_s(cells, "split", 64) == pytest.approx(3.0)
    assert load_s(cells, "basic", 64) == pytest.approx(6.0)


def test_a_load_that_was_not_measured_is_shown_as_a_dash():
    assert load_s({}, "split", 64) is None
    row = next(line for line in tables({}, PLAN).splitlines() if line.startswith("| `split` |"))
    assert row == "| `split` | - | - |"


def test_the_tables_hold_the_ratios_of_medians():
    cells = named(
        cell("dualpath", "held", 64, 0.5),
        cell("basic", "held", 64, 2.0),
        cell("split", "lone", 64, 3.5),
        cell("basic", "lone", 64, 8.0),
        cell("split", "burst", 64, 1.0, job_s=4.0),
        cell("basic", "burst", 64, 1.0, job_s=7.0),
    )
    lines = tables(cells, PLAN).splitlines()
    assert "| load time `split`/`basic` | 0.500 | - | 0.5 |" in lines
    assert "| TTFT `split`/`basic` | 0.438 | - | - |" in lines
    assert "| `split` | 4.00 | 1.750 | 2 |" in lines


def test_a_burst_shows_what_each_engine_read_and_how_many_of_them_may_read():
    def burst(mode: str, job_s: float, **store_bytes: int) -> Cell:
        engines = {engine.replace("_", "-"): count for engine, count in store_bytes.items()}
        return Cell(mode, "burst", 64, job_s=[job_s] * 2, ttft_s=[[1.0]] * 2, store_bytes=engines)

    cells = named(
        burst("basic", 12.0, prefill_0=24_000_000, decode_0=0, decode_1=0),
        burst("split", 4.0, decode_1=8_000_000, decode_0=6_000_000, prefill_0=10_000_000),
    )
    plan = replace(PLAN, lengths=(), decode_engines=2, burst_policies=("split", "decode"), held=False)
    assert tables(cells, plan).splitlines() == [
        "| 2 prompts of 64 at once | JCT, s | JCT `basic`/this | limit "
        "| `prefill-0` read, MB | `decode-0` read, MB | `decode-1` read, MB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| upstream, `basic` | 12.00 | - | - | 12 | 0 | 0 |",
        "| `split` | 4.00 | 3.000 | 3 | 5 | 3 | 4 |",
        "| `decode` | - | - | - | - | - | - |",
    ]


@pytest.mark.parametrize(
    ("policy", "limit"), [("prefill", 1), ("decode", 2), ("shorter_queue", 3), ("split", 3)]
)
def test_a_burst_gains_at_most_the_engines_that_its_policy_lets_read(policy, limit):
    assert burst_limit(policy, decode_engines=2) == limit


def test_a_plan_fills_the_store_with_each_prompt_once():
    plan = replace(PLAN, lengths=(64, 128), resident_lengths=(128, 256))
    assert [len(prompt) for prompt in plan.prompts] == [64, 128, 256, 64, 64]
    assert len({tuple(prompt) for prompt in plan.prompts}) == 5


def test_forward_goodput_is_the_median_forward_over_the_median_of_mooncake_alone():
    forwarded = [Forward(6_000_000, rate, 1, blocks) for rate, blocks in ((3e9, 2), (1e9, 1), (2e9, 5))]
    known = Goodput(64, 6_000_000, {PLAIN: [4e9, 2.5e9, 2e9]}, forwarded)
    unknown = Goodput(128, 9_000_000)
    plan = replace(PLAN, lengths=(), burst_requests=0, resident_lengths=(64, 128))
    rows = [line.split(" | ") for line in tables({}, plan, [known, unknown]).splitlines()]
    found = {label.removeprefix("| "): values for label, *values in rows}
    assert found["forwarded, MB"] == ["6", "9 |"]
    assert found["forward, GB/s"] == ["2.00", "- |"]
    assert found["calls of Mooncake"] == ["1", "- |"]
    assert found["blocks"] == ["1 to 5", "- |"]
    assert found[f"Mooncake alone, {PLAIN}, GB/s"] == ["2.50", "- |"]
    assert next(values for label, values in found.items() if "target" in label) == ["0.800", "- |"]


def test_only_forwards_that_began_in_a_window_count(tmp_path):
    def forward(number: int, begun_us: int, name: str = "decode to prefill") -> dict:
        attributes = {
            "dualpath.bytes": {"intValue": str(number * 1000)},
            "dualpath.transfers": {"intValue": "1"},
            "dualpath.blocks": {"intValue": "3"},
        }
        listed = [{"key": key, "value": value} for key, value in attributes.items()]
        return span(f"{number:016x}", name, begun_us, begun_us + 5, attributes=listed)

    spans = (forward(1, 999), forward(2, 2_100), forward(3, 1_000), forward(4, 1_100, "load_back"))
    path = tmp_path / "spans.jsonl"
    path.write_text(json.dumps(otlp("prefill-0", *spans)) + "\n")
    found = forwards(path, [(1_000_000, 1_500_000), (2_000_000, 2_500_000)])
    assert found == [Forward(3000, pytest.approx(6e8), 1, 3), Forward(2000, pytest.approx(4e8), 1, 3)]


def test_stages_are_medians_over_the_requests_of_a_cell_and_of_no_other_request():
    def read(number: int, begun_us: int, ended_us: int) -> dict:
        return span(f"{number:016x}", "store to prefill", begun_us, ended_us)

    reads = (read(1, 1_100, 1_400), read(2, 2_200, 2_700), read(3, 9_000, 9_900))
    traces = jaeger.traces([otlp("prefill-0", *reads)])
    windows_ns = [(1_000_000, 2_000_000), (2_000_000, 3_000_000)]
    begun_s, length_s = stage_times(traces, windows_ns)["prefill store to prefill"]
    assert (begun_s, length_s) == (pytest.approx(150e-6), pytest.approx(400e-6))


def test_a_stage_that_one_request_did_not_have_is_left_out():
    traces = jaeger.traces([otlp("decode-0", span("1" * 16, "store to decode", 1_100, 1_400))])
    assert stage_times(traces, [(1_000_000, 2_000_000), (2_000_000, 3_000_000)]) == {}


def test_a_health_check_that_passes_during_a_request_is_not_counted():
    request = (span("1" * 16, "prefill Req", 1_000, 1_900), span("2" * 16, "prefill_forward", 1_700, 1_800))
    check = (span("3" * 16, "prefill Req", 1_100, 1_150), span("4" * 16, "prefill_forward", 1_110, 1_140))
    of_another_trace = [item | {"traceId": "f" * 32} for item in check]
    traces = jaeger.traces([otlp("prefill-0", *request, *of_another_trace)])
    begun_s, length_s = stage_times(traces, [(1_000_000, 2_000_000)])["prefill prefill_forward"]
    assert (begun_s, length_s) == (pytest.approx(700e-6), pytest.approx(100e-6))
