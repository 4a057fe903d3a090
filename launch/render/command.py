"""`dualpath render`: writes what other hosts, or Kubernetes, need to run a cluster."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from dualpath_sgl.launch.config.cluster import ConfigError
from dualpath_sgl.launch.options import fail, loaded
from dualpath_sgl.launch.plan.fixed import host_plan, kubernetes_plan
from dualpath_sgl.launch.render.hosts import Options, render_hosts, state_directory
from dualpath_sgl.launch.render.kubernetes import render_kubernetes
from dualpath_sgl.terminal.console import output

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

render_app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


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
    description = loaded(config)
    python = python or Path(sys.executable)
    try:
        path = f"{python.parent}:{SYSTEM_PATH}"
        plan = host_plan(description, state_directory(description.name) / "spans.jsonl", path)
        write(out, render_hosts(description, plan, Options(python, user)))
    except ConfigError as error:
        fail(f"{config}: {error}")
    except OSError as error:
        fail(f"--out {out}: {error.strerror}; name another directory")
    output().print(
        f"written: {out}; on each host run its install.sh as root", highlight=False, soft_wrap=True
    )


@render_app.command("kubernetes")
def kubernetes(
    config: Annotated[Path, typer.Argument(help="Cluster description (YAML) with a section kubernetes.")],
    out: Annotated[Path, typer.Option(help="Directory that gets the objects.")],
) -> None:
    """Write a directory for `kubectl apply -k`: pods with probes and keys, services, network policies."""
    description = loaded(config)
    try:
        write(out, render_kubernetes(description, kubernetes_plan(description)))
    except ConfigError as error:
        fail(f"{config}: {error}")
    except OSError as error:
        fail(f"--out {out}: {error.strerror}; name another directory")
    has_keys = description.security is not None and description.security.keys is not None
    copy = f"cp -r {description.security.keys} {out}/keys, then " if has_keys and description.security else ""
    output().print(f"written: {out}; next: {copy}kubectl apply -k {out}", highlight=False, soft_wrap=True)


def write(out: Path, files: dict[str, str]) -> None:
    """Each text below `out`; scripts can be run.  Raises OSError."""
    for name, text in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        if path.suffix == ".sh":
            os.chmod(path, 0o755)
