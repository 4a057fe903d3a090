"""Tables and stage times of load cells with known numbers."""

import pytest
from otlp_samples import otlp, span

from evals import jaeger
from evals.gpu_loads import Cell, LoadPlan
from evals.gpu_loads_report import load_s, stage_times, tables

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
    assert "| `split` | 4.00 | 1.750 | 2 | 0 | 0 |" in lines


def test_stages_are_medians_over_the_requests_of_a_cell_and_of_no_other_request():
    def read(number: int, begun_us: int, ended_us: int) -> dict:
        return span(f"{number:016x}", "storage.read", begun_us, ended_us)

    reads = (read(1, 1_100, 1_400), read(2, 2_200, 2_700), read(3, 9_000, 9_900))
    traces = jaeger.traces([otlp("prefill-0", *reads)])
    windows_ns = [(1_000_000, 2_000_000), (2_000_000, 3_000_000)]
    begun_s, length_s = stage_times(traces, windows_ns)["prefill storage.read"]
    assert (begun_s, length_s) == (pytest.approx(150e-6), pytest.approx(400e-6))


def test_a_stage_that_one_request_did_not_have_is_left_out():
    traces = jaeger.traces([otlp("decode-0", span("1" * 16, "storage.read", 1_100, 1_400))])
    assert stage_times(traces, [(1_000_000, 2_000_000), (2_000_000, 3_000_000)]) == {}


def test_a_health_check_that_passes_during_a_request_is_not_counted():
    request = (span("1" * 16, "prefill Req", 1_000, 1_900), span("2" * 16, "prefill_forward", 1_700, 1_800))
    check = (span("3" * 16, "prefill Req", 1_100, 1_150), span("4" * 16, "prefill_forward", 1_110, 1_140))
    of_another_trace = [item | {"traceId": "f" * 32} for item in check]
    traces = jaeger.traces([otlp("prefill-0", *request, *of_another_trace)])
    begun_s, length_s = stage_times(traces, [(1_000_000, 2_000_000)])["prefill prefill_forward"]
    assert (begun_s, length_s) == (pytest.approx(700e-6), pytest.approx(100e-6))
