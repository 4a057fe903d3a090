"""The command `dualpath bench-load`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from rich.console import Console

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.common.explained import failures_explained
from dualpath_sgl.launch.config import CLUSTERS
from dualpath_sgl.terminal.console import errors

OUT = Path("results/bench-load")
REPORT_WIDTH = 130
"""Columns of the tables where there is no terminal."""
CLUSTER = CLUSTERS / "bench-load.yaml"


def main(*, quick: bool, repetitions: int, config: Path | None, out: Path | None) -> int:
    """Run the benchmark; 0 when the answers are equal and nothing was read that was near already.

    Missed targets do not fail it: they depend on the machine, and the table shows them.
    """
    from dualpath_sgl.evals.load.bench import LoadOptions, run, unmet
    from dualpath_sgl.launch.config.cluster import load

    console = Console(highlight=False, width=None if sys.stdout.isatty() else REPORT_WIDTH)
    with failures_explained():
        if out is None and OUT.exists():
            shutil.rmtree(OUT)
        out = out or OUT
        if out.exists() and any(out.iterdir()):
            raise EvalError(f"out is {out}, which is not empty; name another folder or remove it")
        options = LoadOptions(load(config or CLUSTER), out, 1 if quick else repetitions, quick)
        summary = run(options, console)
    for problem in unmet(summary):
        errors.print(f"[red]not as it must be:[/] {problem}")
    console.print(f"results: {out}/summary.json, jct.png")
    return 1 if unmet(summary) else 0
