"""The router's benchmark with a real router and scheduler: it counts what was really placed and answered."""

from __future__ import annotations

import asyncio
import json

import pytest

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.router import bench


def test_the_summary_holds_the_figures_of_both_kinds_of_answers(tmp_path):
    bench.main(seconds=1, clients=4, pairs=1, out=tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    for kind in ("whole", "streamed"):
        found = summary[kind]
        assert found["requests_per_s"] > 0
        assert 0 < found["p50_ms"] <= found["p99_ms"]
        # Both figures are made of the same CPU time.
        router_cores = found["router_cpu_us_per_request"] * found["requests_per_s"] / 1e6
        assert router_cores == pytest.approx(found["cores"]["router"])


def test_a_router_that_does_not_start_is_an_error_with_its_last_words(tmp_path):
    log = tmp_path / "router.log"
    with (
        bench._running_router("tcp://127.0.0.1:1", [], log) as (router, url),
        pytest.raises(EvalError, match="give at least one --prefill and one --decode"),
    ):
        asyncio.run(bench._wait_until_placing(router, url))
