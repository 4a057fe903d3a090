"""`dualpath render`: writes what other hosts need to run their part of a cluster."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.markup import escape

from dualpath_sgl.launch.config.cluster import ClusterConfig, ConfigError, load
from dualpath_sgl.launch.plan.fixed import host_plan
from dualpath_sgl.launch.render.hosts import Options, render_hosts, state_directory
from dualpath_sgl.terminal.console import errors, output

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

render_app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@render_app.callback()
def _several_commands() -> None:
    # Without a callback typer drops the name of an app's only command.
    pass


@render_app.command("hosts")
def hosts(
    config: Annotated[Path, typer.Argument(help="Cluster description (YAML) with a section hosts.")],
    out: Annotated[Path, typer.Option(help="Directory that gets one directory for each host.")],
    python: Annotated[
        Path | None,
        typer.Option(
            help="The hosts' interpreter, which DualPath is installed for; left out: this one's path."
        ),
    ] = None,
    user: Annotated[str, typer.Option(help="Who the processes run as.")] = "dualpath",
) -> None:
    """Write systemd units, environment files, a firewall table and an installer for each host."""
    description = _load(config)
    python = python or Path(sys.executable)
    try:
        path = f"{python.parent}:{SYSTEM_PATH}"
        plan = host_plan(description, state_directory(description.name) / "spans.jsonl", path)
        write(out, render_hosts(description, plan, Options(python, user)))
    except ConfigError as error:
        _fail(f"{config}: {error}")
    except OSError as error:
        _fail(f"--out {out}: {error.strerror}; name another directory")
    output().print(f"written: {out}; on each host run its install.sh as root", highlight=False)


def write(out: Path, files: dict[str, str]) -> None:
    """Each text below `out`; scripts can be run.  Raises OSError."""
    for name, text in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        if path.suffix == ".sh":
            os.chmod(path, 0o755)


def _load(path: Path) -> ClusterConfig:
    try:
        return load(path)
    except ConfigError as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    errors.print(f"[red]error:[/] {escape(message)}")
    raise typer.Exit(1)
