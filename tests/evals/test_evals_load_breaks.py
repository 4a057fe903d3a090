"""The load benchmark on a real cluster whose prefill engine is killed in the middle of it."""

import os
import signal
import threading
from io import StringIO

import pytest
from rich.console import Console

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.load import bench, plan
from dualpath_sgl.evals.load.command import CLUSTER
from dualpath_sgl.evals.load.outcome import progress
from dualpath_sgl.evals.relay.world import eventually
from dualpath_sgl.launch.config.cluster import load
from dualpath_sgl.launch.processes.run_dir import read_state
from dualpath_sgl.launch.topology.network import obstacles

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(obstacles()), reason=f"no shaped networks here: {obstacles()}"),
]

BASIC = plan.make_plan(1, quick=True).clusters[0]
FAST = load(CLUSTER)
FAST = FAST.model_copy(update={"network": FAST.network.model_copy(update={"storage_rate": "400mbit"})})


def killed_after_the_first_measurement(out) -> list[int]:
    killed: list[int] = []

    def kill() -> None:
        file = out / progress.FILE
        eventually(file.exists, "the run begins", within_s=60)
        eventually(lambda: measured(out), "the first cell is measured", within_s=500)
        pid = read_state(out / BASIC.name).processes["prefill-0"].pid
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    threading.Thread(target=kill, daemon=True).start()
    return killed


def measured(out) -> dict[str, float]:
    """Time of every measurement so far."""
    run = progress.Progress.model_validate_json((out / progress.FILE).read_bytes())
    return {name: cell.samples[0].job_s for name, cell in run.cells.items()}


def test_a_cluster_that_breaks_is_started_again_and_nothing_is_measured_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "make_plan", lambda *_: plan.Plan((BASIC,)))
    said, out = StringIO(), tmp_path / "run"
    killed = killed_after_the_first_measurement(out)
    outcome = bench.run(bench.LoadOptions(FAST, out, 1, quick=True), Console(file=said, width=500))
    assert killed and "attempt 1 of 2 broke" in said.getvalue() and outcome.problems == ()
    cells = outcome.summary.details.cells
    assert [*cells] == [cell.name for cell in BASIC.cells]
    assert {len(cell.samples) for cell in cells.values()} == {1}
    assert said.getvalue().count(": JCT") == len(cells)
    assert outcome.summary.tokens_equal
    with pytest.raises(EvalError, match="finished run"):
        bench.run(bench.LoadOptions(FAST, out, 1, quick=True), Console(file=said))
