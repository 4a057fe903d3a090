"""The figure of the balance evaluation, and whom the spans name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from otlp_samples import otlp, span

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.compare.balance import CLUSTER, balance, placed_by, shrunk
from dualpath_sgl.launch.config.cluster import RouterKind, load


def test_equal_reads_are_1_and_one_reader_alone_is_the_number_of_engines():
    assert balance({"p0": 5, "p1": 5, "d0": 5, "d1": 5}) == 1
    assert balance({"p0": 9, "p1": 0, "d0": 0, "d1": 0}) == 4
    assert balance({"p0": 3, "d0": 1}) == 1.5


def test_no_read_at_all_is_an_error_and_not_a_perfect_balance():
    with pytest.raises(EvalError, match="give more --agents"):
        balance({"p0": 0, "d0": 0})


def test_only_routes_of_the_run_are_counted(tmp_path: Path):
    def route(span_id: str, start_us: int, who: str) -> dict:
        by = {"key": "dualpath.placed_by", "value": {"stringValue": who}}
        return span(span_id, "route", start_us, start_us + 10, attributes=[by])

    lines = [
        otlp("dualpath-router", route("0" * 15 + "1", 1_000, "router")),
        otlp("dualpath-router", route("0" * 15 + "2", 3_000, "scheduler")),
        otlp("dualpath-router", route("0" * 15 + "3", 4_000, "scheduler")),
        otlp("dualpath-router", span("0" * 15 + "4", "place", 4_000, 4_001)),
    ]
    spans = tmp_path / "spans.jsonl"
    spans.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert placed_by(spans, 2_000_000) == {"scheduler": 2}


def test_the_cluster_it_runs_on_by_default_has_several_engines_behind_the_placing_router():
    config = load(CLUSTER)
    assert config.router.kind is RouterKind.PLACING
    assert min(config.prefill.count, config.decode.count) > 1


def test_a_read_rate_without_a_unit_is_an_error_that_says_what_to_give():
    with pytest.raises(EvalError, match=r"--read-rate is '10': give a number above 0 and kbit, mbit or gbit"):
        shrunk(load(CLUSTER), "10")


def test_every_engine_reads_at_the_given_rate_or_without_a_limit():
    assert shrunk(load(CLUSTER), "10mbit").store.read_rate == "10mbit"
    assert shrunk(load(CLUSTER), None).store.read_rate is None
