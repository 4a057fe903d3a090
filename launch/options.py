"""Options that several commands have, and how a command says that it cannot go on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.markup import escape

from dualpath_sgl.launch.config.cluster import ClusterConfig, ConfigError, load
from dualpath_sgl.terminal.console import errors

DEFAULT_RUN_DIR = Path("runs/current")

RunDir = Annotated[Path, typer.Option("--run-dir", help="Logs and state of the cluster.")]
SchedulerAddress = Annotated[
    str | None,
    typer.Option("--scheduler", help="Ask the scheduler at this ZeroMQ address instead of a run directory."),
]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        "--key-file",
        envvar="DUALPATH_KEY_FILE",
        help="A peer's .key_secret; a run directory names its own.",
    ),
]
SchedulerKeyFile = Annotated[
    Path | None,
    typer.Option("--scheduler-key-file", envvar="DUALPATH_SCHEDULER_KEY_FILE", help="The scheduler's .key."),
]


def fail(message: str) -> NoReturn:
    """Exit status 1."""
    errors.print(f"[red]error:[/] {escape(message)}")
    raise typer.Exit(1)


def loaded(path: Path) -> ClusterConfig:
    """The cluster file; a wrong one ends the command."""
    try:
        return load(path)
    except ConfigError as error:
        fail(str(error))
