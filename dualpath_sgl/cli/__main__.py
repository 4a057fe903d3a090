"""`dualpath`, also `python -m dualpath_sgl.cli`."""

from __future__ import annotations

import importlib
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from dualpath_sgl import __version__, cli
from dualpath_sgl.cli.lazy import add_programs
from dualpath_sgl.launch.cli import app
from dualpath_sgl.launch.top.command import top
from scheduler_svc.keys_command import keys_app

app.info.help = (cli.__doc__ or "").splitlines()[0]
app.add_typer(keys_app, name="keys")
app.command()(top)
add_programs(app)


def versions() -> list[str]:
    """This package, and the installed ones whose releases it is made for."""
    wanted = {"sglang", "sglang-router", "torch"}
    found = sorted(
        f"{package.name} {package.version}"
        for package in metadata.distributions()
        if package.name in wanted or package.name.startswith("mooncake-transfer-engine")
    )
    return [f"dualpath-sgl {__version__}", *found]


def _print_versions(wanted: bool) -> None:
    if wanted:
        print(*versions(), sep="\n")
        raise typer.Exit


@app.callback()
def _dualpath(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_versions, is_eager=True, help="Print versions and exit."),
    ] = False,
) -> None:
    pass


@app.command()
def demo() -> None:
    """Replay a real agent trace on SGLang as it is and with DualPath; show what that gains (three minutes)."""
    sys.exit(importlib.import_module("dualpath_sgl.evals.compare.demo").main())


@app.command("bench-load")
def bench_load(
    quick: Annotated[
        bool, typer.Option("--quick", help="Only 1P1D; basic, split and relay, each once: for development.")
    ] = False,
    repetitions: Annotated[int, typer.Option(min=1, help="Measurements of each burst.")] = 3,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Cluster description; default: bench-load.yaml.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Result folder; default: results/bench-load. A run that has not ended goes on; one that has is "
            "replaced in the default folder."
        ),
    ] = None,
) -> None:
    """Measure loads through every path on shaped links against upstream (root; about 40 minutes)."""
    module = importlib.import_module("dualpath_sgl.evals.load.command")
    sys.exit(module.main(quick=quick, repetitions=repetitions, config=config, out=out))


def main() -> None:
    app()


if __name__ == "__main__":
    main()
