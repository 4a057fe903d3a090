"""The command `dualpath eval matrix`, up to the report."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.matrix import results
from dualpath_sgl.evals.matrix.environment import of_this_machine
from dualpath_sgl.evals.matrix.experiment import load_experiment
from dualpath_sgl.evals.matrix.results import finished_cells
from dualpath_sgl.evals.matrix.runner import Runner
from dualpath_sgl.evals.matrix.target import attach
from dualpath_sgl.launch.config.cluster import load

OUT = Path("results/matrix")


class Prepared(NamedTuple):
    """An experiment that can be run."""

    runner: Runner
    out: Path

    def run(self) -> list[str]:
        """Run what is not finished; what must hold of any run, and does not."""
        failures = self.runner.run().failures
        wrong = [cell.name for cell in finished_cells(self.out) if cell.tokens_equal is False]
        return [f"{failure.cell} failed: {failure.problem.splitlines()[0]}" for failure in failures] + [
            f"{name}: tokens differ from the single server's" for name in wrong
        ]

    def has_cells(self) -> bool:
        return any((self.out / results.CELLS).glob("*.json"))


def prepare(
    file: Path, out: Path | None, url: str | None, run_dir: Path | None, console: Console
) -> Prepared:
    """Read what is asked for and note it in the result folder.  Raises EvalError, ConfigError, RunDirError."""
    if run_dir is not None and url is None:
        raise EvalError("--run-dir is given without --url: it tells of a deployment that runs already")
    experiment = load_experiment(file)
    cluster = load(experiment.cluster)
    attached = attach(url, run_dir, cluster) if url is not None else None
    out = out or OUT / experiment.name
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, out / results.EXPERIMENT)
    results.write(experiment, out / results.EXPERIMENT_READ)
    results.write(of_this_machine(), out / results.ENVIRONMENT)
    return Prepared(Runner(experiment, cluster, out, console, attached), out)
