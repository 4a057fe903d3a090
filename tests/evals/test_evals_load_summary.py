"""The load benchmark's figures, made of cells with known numbers, and the schema of its summary."""

import json
from io import StringIO
from pathlib import Path

import pytest
from pydantic import ValidationError
from rich.console import Console

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.load import plot
from dualpath_sgl.evals.load.bench import LoadOptions, print_summary, run, unmet
from dualpath_sgl.evals.load.command import CLUSTER
from dualpath_sgl.evals.load.summary import (
    TARGETS,
    Cell,
    Details,
    Found,
    Goodput,
    LoadSummary,
    Sample,
    figure_values,
    figures,
)
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
]


def sample(job_s: float, ttft_s: float = 1.0, read_bytes: int = 0, planned: int | None = None) -> Sample:
    return Sample(
        job_s=job_s,
        ttft_s=[ttft_s],
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


def values(goodput: Goodput | None = None, **samples) -> dict:
    return figure_values(Found(cells(**samples), goodput, PAGE_BYTES))


def summary(**samples) -> LoadSummary:
    made = cells(**samples)
    found = figure_values(Found(made, None, PAGE_BYTES))
    details = Details(
        figures=figures(found),
        cells=made,
        goodput=None,
        storage_bits_per_s=100_000_000,
        compute_bits_per_s=None,
        kv_bytes_per_token=65536,
        prompt_tokens=512,
        requests=8,
        basic_utilisation=0.97,
        near_bound_utilisation=0.85,
        near_bound_jct_ratio=1.7,
        store_peak_bytes_per_s=25e6,
        store_capacity_bytes_per_s=None,
    )
    return LoadSummary(**found, tokens_equal=True, details=details)


def test_the_summary_has_every_figure_by_name_and_each_with_target_and_limit_in_its_details():
    document = json.loads(summary(basic__burst=sample(20), split__burst=sample(10)).model_dump_json())
    assert set(document) == {*NAMES, "tokens_equal", "details"}
    assert set(document["details"]["figures"]) == set(NAMES) == set(TARGETS)
    split = document["details"]["figures"]["jct_ratio_1p1d_split"]
    assert (split["value"], split["target"], split["limit"], split["met"]) == (2.0, 1.85, 2.0, True)


def test_a_summary_with_a_figure_left_out_is_refused():
    document = json.loads(summary(basic__burst=sample(20)).model_dump_json())
    del document["forward_goodput_ratio"]
    with pytest.raises(ValidationError, match="forward_goodput_ratio"):
        LoadSummary.model_validate(document)


def test_a_figure_without_its_cells_is_not_measured_rather_than_zero():
    found = values(basic__burst=sample(20))
    assert found == dict.fromkeys(NAMES)
    assert figures(found)["jct_ratio_1p1d_split"].met is None


def test_a_jct_ratio_compares_medians_of_one_topology():
    found = values(
        basic__burst=[sample(20), sample(19), sample(90)],
        split__burst=sample(10),
        t1p2d__basic__burst=sample(21),
        t1p2d__split__burst=sample(7),
        t2p1d__basic__burst=sample(8),
    )
    assert found["jct_ratio_1p1d_split"] == 2.0
    assert found["jct_ratio_1p2d_split"] == 3.0
    assert found["jct_split_1p1d_over_basic_2p1d"] == 1.25
    assert figures(found)["jct_split_1p1d_over_basic_2p1d"].met is False


def test_load_time_is_what_loading_adds_to_the_first_token():
    found = values(
        basic__lone=sample(3, ttft_s=3.0),
        oracle_upstream__lone=sample(1, ttft_s=1.0),
        split__lone=sample(2, ttft_s=1.75),
        oracle__lone=sample(1, ttft_s=0.75),
    )
    assert found["load_ratio_lone_split"] == 0.5


def test_questions_to_the_master_are_no_pages_but_one_page_is():
    assert values(split__resident=sample(1, read_bytes=9000, planned=0))["store_bytes_when_resident"] == 0
    found = values(
        split__resident=sample(1, read_bytes=9000, planned=0),
        decode__resident=sample(1, read_bytes=PAGE_BYTES + 9000, planned=0),
    )
    assert found["store_bytes_when_resident"] == PAGE_BYTES


def test_pages_that_only_the_scheduler_counted_are_not_overlooked():
    assert values(split__resident=sample(1, planned=PAGE_BYTES))["store_bytes_when_resident"] == PAGE_BYTES


def test_goodput_is_compared_by_medians():
    goodput = Goodput(size_bytes=1, forward_bytes_per_s=[9, 8, 1], raw_bytes_per_s=[10, 10, 10])
    assert values(goodput)["forward_goodput_ratio"] == pytest.approx(0.8)


def test_different_answers_or_bytes_read_again_are_a_failure_and_a_missed_target_is_not():
    good = summary(basic__burst=sample(20), split__burst=sample(19))
    assert unmet(good) == []
    assert unmet(good.model_copy(update={"tokens_equal": False}))
    assert unmet(good.model_copy(update={"store_bytes_when_resident": PAGE_BYTES}))


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
    found = summary(basic__burst=sample(20), split__burst=sample(10), split__lone=sample(2))
    out = StringIO()
    print_summary(found, Console(file=out, width=200))
    for target in TARGETS.values():
        assert target.what in out.getvalue()
    assert "met" in out.getvalue() and "not measured" in out.getvalue()
    plot.draw(found, tmp_path / "jct.png")
    assert (tmp_path / "jct.png").read_bytes().startswith(b"\x89PNG")
