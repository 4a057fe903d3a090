"""The load benchmark's figures, made of cells with known numbers, and the schema of its summary."""

import json
from io import StringIO
from pathlib import Path

import pytest
from pydantic import ValidationError
from rich.console import Console

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.load.bench import LoadOptions, run
from dualpath_sgl.evals.load.command import CLUSTER
from dualpath_sgl.evals.load.outcome import plot
from dualpath_sgl.evals.load.outcome.cells import Cell, FaultSeen, Goodput, Sample
from dualpath_sgl.evals.load.outcome.figures import MAIN, TARGETS, Figure, Found, cpu_s_per_gib, figures
from dualpath_sgl.evals.load.outcome.report import print_summary
from dualpath_sgl.evals.load.outcome.summary import LoadSummary, Setting, summarise, unmet
from dualpath_sgl.launch.config.cluster import ClusterConfig, load

PAGE_BYTES = 1 << 20
NAMES = [
    "jct_ratio_1p1d_split",
    "jct_ratio_1p2d_split",
    "jct_ratio_1p1d_shorter_queue",
    "jct_split_1p1d_over_basic_2p1d",
    "load_ratio_lone_split",
    "ttft_ratio_lone_decode_over_prefill",
    "store_bytes_when_resident",
    "jct_ratio_not_storage_bound",
    "forward_goodput_ratio",
    "store_bytes_ratio_both_over_split",
    "jct_ratio_1p1d_relay",
    "jct_ratio_1p2d_relay",
    "load_ratio_lone_relay",
    "load_ratio_lone_two_relays",
]


def sample(
    job_s: float,
    ttft_s: float = 1.0,
    read_bytes: int = 0,
    planned: int | None = None,
    e2e_s: tuple[float, ...] = (1.0,),
    cpu_s: dict[str, float] | None = None,
    fault: FaultSeen | None = None,
) -> Sample:
    return Sample(
        job_s=job_s,
        ttft_s=[ttft_s],
        e2e_s=list(e2e_s),
        cpu_s=cpu_s or {},
        fault=fault,
        storage_bytes={"prefill-0": read_bytes, "decode-0": 0},
        storage_utilisation={"prefill-0": 0.97, "decode-0": 0.0},
        store_sent_bytes=read_bytes,
        cached_tokens=512,
        tokens_equal=True,
        planned_read_bytes=planned,
    )


def cells(**samples: Sample | list[Sample]) -> dict[str, Cell]:
    """`basic__burst=...` is the cell 1p1d/basic/burst; `t1p2d__split__burst` names its topology."""
    made = {}
    for name, given in samples.items():
        parts = name.split("__")
        topology = parts.pop(0)[1:] if len(parts) == 3 else "1p1d"
        cell = Cell(
            topology=topology,
            mode=parts[0],
            load=parts[1],
            requests=8,
            storage_bits_per_s=100_000_000,
            samples=given if isinstance(given, list) else [given],
        )
        made[cell.name] = cell
    return made


def found(goodput: Goodput | None = None, **samples) -> dict[str, Figure]:
    return figures(Found(cells(**samples), goodput, PAGE_BYTES))


def values(goodput: Goodput | None = None, **samples) -> dict[str, float | None]:
    return {name: figure.value for name, figure in found(goodput, **samples).items()}


def summary(**samples) -> LoadSummary:
    setting = Setting(
        storage_bits_per_s=100_000_000,
        compute_bits_per_s=None,
        kv_bytes_per_token=65536,
        prompt_tokens=512,
        lone_tokens=1024,
        page_tokens=16,
        requests=8,
        repetitions=1,
    )
    measured = Found(cells(**samples), None, PAGE_BYTES)
    return summarise(measured, setting, tokens_equal=True, sources=["abc"], store_capacity_bytes_per_s=None)


def test_the_summary_has_every_figure_by_name_and_each_with_target_and_limit_in_its_details():
    document = json.loads(summary(basic__burst=sample(20), split__burst=sample(10)).model_dump_json())
    assert set(document) == {*NAMES, "tokens_equal", "details"}
    assert set(document["details"]["figures"]) == set(TARGETS) > set(MAIN) == set(NAMES)
    split = document["details"]["figures"]["jct_ratio_1p1d_split"]
    assert (split["value"], split["target"], split["limit"], split["met"]) == (2.0, 1.85, 2.0, True)


def test_a_summary_with_a_figure_left_out_is_refused():
    document = json.loads(summary(basic__burst=sample(20)).model_dump_json())
    del document["forward_goodput_ratio"]
    with pytest.raises(ValidationError, match="forward_goodput_ratio"):
        LoadSummary.model_validate(document)


def test_a_figure_without_its_cells_is_not_measured_rather_than_zero():
    figure = found(basic__burst=sample(20))["jct_ratio_1p1d_split"]
    assert (figure.value, figure.met, figure.repetitions) == (None, None, 0)
    assert set(values(basic__burst=sample(20)).values()) == {None}


def test_a_jct_ratio_compares_medians_of_one_topology():
    ratios = found(
        basic__burst=[sample(20), sample(19), sample(90)],
        split__burst=sample(10),
        t1p2d__basic__burst=sample(21),
        t1p2d__split__burst=sample(7),
        t2p1d__basic__burst=sample(8),
    )
    assert ratios["jct_ratio_1p1d_split"].value == 2.0
    assert ratios["jct_ratio_1p2d_split"].value == 3.0
    assert ratios["jct_split_1p1d_over_basic_2p1d"].value == 1.25
    assert ratios["jct_split_1p1d_over_basic_2p1d"].met is False


def test_a_ratio_has_its_extremes_and_its_repetitions_beside_it():
    figure = found(basic__burst=[sample(20), sample(18), sample(21)], relay__burst=[sample(10), sample(12)])[
        "jct_ratio_1p1d_relay"
    ]
    assert figure.value == pytest.approx(20 / 11)
    assert (figure.low, figure.high, figure.repetitions) == (18 / 12, 21 / 10, 2)


def test_load_time_is_what_loading_adds_to_the_first_token():
    ratios = values(
        basic__lone=sample(3, ttft_s=3.0),
        oracle_upstream__lone=sample(1, ttft_s=1.0),
        split__lone=sample(2, ttft_s=1.75),
        oracle__lone=sample(1, ttft_s=0.75),
        relay__lone=sample(2, ttft_s=1.6),
        t1p2d__relay__lone=sample(2, ttft_s=1.3),
        oracle_relay__lone=sample(1, ttft_s=0.5),
    )
    assert ratios["load_ratio_lone_split"] == 0.5
    assert ratios["load_ratio_lone_relay"] == pytest.approx(0.55)
    assert ratios["load_ratio_lone_two_relays"] == pytest.approx(0.4)


def test_the_rest_of_a_faulty_burst_is_measured_by_what_its_links_can_still_do():
    # 100 MB in all, 60 of them after the fault: 12 s at 5 MB/s, and it took 15.
    fault = FaultSeen(after_s=4.0, received_bytes=40_000_000, rest_bits_per_s=40e6)
    shares = values(
        relay__burst=sample(9, read_bytes=100_000_000),
        relay__killed=sample(19, read_bytes=110_000_000, fault=fault),
    )
    assert shares["rest_share_killed_relay"] == pytest.approx(0.8)


def test_the_small_one_of_uneven_loads_ends_with_its_own_last_answer():
    ends = (9.0, 9.0, 9.0, 3.0, 9.0, 9.0, 9.0, 4.0)
    ratios = values(t2p2d__relay__3to1=sample(9, e2e_s=ends), t2p2d__relay__alone=sample(2))
    assert ratios["small_load_relay_over_alone"] == 2.0


def test_cpu_time_of_loading_is_that_of_a_burst_less_what_it_takes_with_nothing_to_load():
    made = cells(
        relay__burst=sample(9, read_bytes=2**31, cpu_s={"prefill-0": 7.0, "relay-0": 4.0}),
        oracle_relay__burst=sample(1, cpu_s={"prefill-0": 1.0}),
    )
    assert cpu_s_per_gib(made) == {"relay": {"prefill-0": 3.0, "relay-0": 2.0}}


def test_questions_to_the_master_are_no_pages_but_one_page_is():
    assert values(split__resident=sample(1, read_bytes=9000, planned=0))["store_bytes_when_resident"] == 0
    ratios = values(
        split__resident=sample(1, read_bytes=9000, planned=0),
        decode__resident=sample(1, read_bytes=PAGE_BYTES + 9000, planned=0),
    )
    assert ratios["store_bytes_when_resident"] == PAGE_BYTES


def test_pages_that_only_the_scheduler_counted_are_not_overlooked():
    assert values(split__resident=sample(1, planned=PAGE_BYTES))["store_bytes_when_resident"] == PAGE_BYTES


def test_goodput_is_compared_by_medians():
    goodput = Goodput(size_bytes=1, forward_bytes_per_s=[9, 8, 1], raw_bytes_per_s=[10, 10, 10])
    assert values(goodput)["forward_goodput_ratio"] == pytest.approx(0.8)


def test_different_answers_or_bytes_read_again_are_a_failure_and_a_missed_target_is_not():
    whole = 8 * 512 * 65536
    good = summary(basic__burst=sample(20, read_bytes=whole), split__burst=sample(19, read_bytes=whole))
    assert unmet(good) == []
    assert unmet(good.model_copy(update={"tokens_equal": False}))
    assert unmet(good.model_copy(update={"store_bytes_when_resident": PAGE_BYTES}))


def test_a_cell_that_read_less_than_there_is_is_a_failure_unless_it_has_nothing_to_read():
    lone = 8 * 1024 * 65536
    good = summary(relay__lone=sample(2, read_bytes=lone), oracle__lone=sample(1), split__resident=sample(1))
    assert unmet(good) == []
    (problem,) = unmet(summary(relay__lone=[sample(2, read_bytes=lone), sample(2, read_bytes=lone // 2)]))
    assert problem.startswith("1p1d/relay/lone: only 268.4 MB were read, of at least 526.1")


def is_refused(config: ClusterConfig, out: Path, said: str) -> bool:
    """Whether the benchmark refuses `config` with these words, before anything starts."""
    with pytest.raises(EvalError, match=said):
        run(LoadOptions(config, out, repetitions=1, quick=True), Console(file=StringIO()))
    return not out.exists()


def test_a_cluster_file_without_a_network_is_refused_before_anything_starts(tmp_path):
    config = ClusterConfig.model_validate({"name": "t", "device": "cpu"})
    assert is_refused(config, tmp_path / "out", "network.storage_rate is missing")


def test_pools_too_small_for_the_burst_are_refused(tmp_path):
    config = load(CLUSTER)
    small = config.model_copy(update={"decode": config.decode.model_copy(update={"max_total_tokens": 512})})
    assert is_refused(small, tmp_path / "out", "decode.max_total_tokens is 512; the burst needs")


def test_the_table_shows_every_figure_with_its_verdict_and_the_plot_is_a_picture(tmp_path):
    good = summary(basic__burst=sample(20), split__burst=sample(10), split__lone=sample(2))
    out = StringIO()
    print_summary(good, Console(file=out, width=250))
    for target in TARGETS.values():
        assert target.what in out.getvalue()
    assert "met" in out.getvalue() and "not measured" in out.getvalue()
    plot.draw(good, tmp_path / "jct.png")
    assert (tmp_path / "jct.png").read_bytes().startswith(b"\x89PNG")
