"""The scheduler's load generator against a real scheduler process: it does what it claims to measure."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from dualpath_sgl.evals.scheduler import bench
from dualpath_sgl.evals.scheduler.bench import TARGETS
from dualpath_sgl.evals.scheduler.load import HIT_PAGES, LOCAL_PAGES, PAGE_BYTES
from scheduler_svc.wire.client import SchedulerClient

WAIT_S = 60.0


def test_each_counted_request_was_placed_reported_planned_and_done():
    with bench._loaded(16) as (_, generator), SchedulerClient(generator.address) as observer:
        generator.run_for(0.5, in_flight=8, progress=lambda count: None)
        generator.drain()
        status = observer.status(WAIT_S)
        while status.rooms_closed < generator.planned:  # dones are not answered
            status = observer.status(WAIT_S)
        assert len(status.engines) == 16 and status.errors == 0
        assert status.rooms_closed == generator.opened == sum(status.paths.values())
        assert len(generator.latencies_s) == 2 * generator.planned
        read = sum(entry.store_read_bytes for entry in status.engines)
        assert read == generator.planned * (HIT_PAGES - LOCAL_PAGES) * PAGE_BYTES

        generator.fill(50, in_flight=8, progress=lambda count: None)
        assert observer.status(WAIT_S).rooms_open == 50


def test_engines_report_in_turn_and_not_all_at_once():
    """In step they would measure a burst of a thousand heartbeats instead of a plan."""
    with bench._loaded(16) as (_, generator):
        due_s = [due for due, _, _ in generator._heartbeats]
        gaps_s = [later - sooner for sooner, later in pairwise(due_s)]
        assert gaps_s == pytest.approx([generator.heartbeat_s / 16] * 15)


def test_the_summary_holds_every_figure_with_a_target(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "WARM_UP_S", 0.2)
    bench.main(seconds=1, engines=16, memory_engines=16, memory_rooms=20, repeats=2, out=tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert all(summary[target.name] > 0 for target in TARGETS)
    for name, figure in (("throughput_runs", "requests_per_s"), ("latency_runs", "plan_p99_ms")):
        assert len(summary[name]) == 2 and summary[figure] == min(run[figure] for run in summary[name])
        assert all(run["cores"]["scheduler"] > 0 and run["cores"]["generator"] > 0 for run in summary[name])
