"""What a person can put right, told in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.markup import escape

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.terminal.console import errors

USAGE_ERROR = 2


@contextmanager
def failures_explained() -> Iterator[None]:
    """Turn what a person can put right into one line on stderr and exit status 2."""
    from dualpath_sgl.launch.config.cluster import ConfigError
    from dualpath_sgl.launch.processes.process import ProcessDied
    from dualpath_sgl.launch.processes.run_dir import RunDirError
    from dualpath_sgl.launch.supervision.readiness import NotReady
    from dualpath_sgl.launch.supervision.supervisor import StartTimeout
    from dualpath_sgl.launch.topology.network import NetworkError

    explained = (EvalError, ConfigError, NotReady, NetworkError, ProcessDied, RunDirError, StartTimeout)
    try:
        yield
    except explained as error:
        errors.print(f"[red]error:[/] {escape(str(error))}")
        raise typer.Exit(USAGE_ERROR) from None
