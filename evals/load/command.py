"""The command `dualpath bench-load`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from rich.console import Console

from dualpath_sgl.evals.common.explained import failures_explained
from dualpath_sgl.launch.config import CLUSTERS
from dualpath_sgl.terminal.console import errors

OUT = Path("results/bench-load")
REPORT_WIDTH = 140
"""Columns of the tables where there is no terminal."""
CLUSTER = CLUSTERS / "bench-load.yaml"


def main(*, quick: bool, repetitions: int, config: Path | None, out: Path | None) -> int:
    """Run the benchmark; 0 when all was measured, the answers are equal and nothing was read that was near already.

    Missed targets do not fail it: they depend on the machine, and the table shows them.
    """
    from dualpath_sgl.evals.load.bench import LoadOptions, run
    from dualpath_sgl.evals.load.outcome import progress
    from dualpath_sgl.evals.load.outcome.report import print_summary
    from dualpath_sgl.evals.load.outcome.summary import unmet
    from dualpath_sgl.launch.config.cluster import load

    console = Console(highlight=False, width=None if sys.stdout.isatty() else REPORT_WIDTH)
    with failures_explained():
        described = load(config or CLUSTER)
        folder = out or OUT
        if out is None and progress.is_finished(folder):
            shutil.rmtree(folder)
        outcome = run(LoadOptions(described, folder, 1 if quick else repetitions, quick), console)
    print_summary(outcome.summary, console)
    problems = unmet(outcome.summary)
    for problem in problems:
        errors.print(f"[red]not as it must be:[/] {problem}")
    for problem in outcome.problems:
        errors.print(f"[red]not measured:[/] {problem}", markup=True)
    if outcome.problems:
        errors.print("the same command measures what is missing")
    console.print(f"results: {folder}/summary.json, jct.png")
    return 1 if problems or outcome.problems else 0
