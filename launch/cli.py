"""The commands that patch packages, run a cluster and look at it: `dualpath up`, `status`, `doctor`, ..."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from dualpath_sgl.launch.config.cluster import ClusterConfig, ConfigError
from dualpath_sgl.launch.options import (
    DEFAULT_RUN_DIR,
    KeyFile,
    RunDir,
    SchedulerAddress,
    SchedulerKeyFile,
    fail,
    loaded,
)
from dualpath_sgl.launch.processes.run_dir import RunDirError, read_state
from dualpath_sgl.launch.setup.patching import PatchError, Report, State, Tree, stacks
from dualpath_sgl.launch.setup.pins import Profile
from dualpath_sgl.launch.supervision.readiness import NotReady, require_ready
from dualpath_sgl.terminal.console import output
from scheduler_svc.wire.keys import KeyFileError

if TYPE_CHECKING:
    from scheduler_svc.wire.protocol import Status

LISTENS_S = 1.0
"""How long is waited for a receiver of traces to take a connection, once."""

console = Console(highlight=False, soft_wrap=True)

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
patch_app = typer.Typer(no_args_is_help=True, help="Patch the pinned packages, check that, or take it back.")
app.add_typer(patch_app, name="patch")
topology_app = typer.Typer(no_args_is_help=True, help="Shaped networks on this machine.")
app.add_typer(topology_app, name="topology")

Package = Annotated[str | None, typer.Option("--package", help="Only this package, e.g. sglang.")]


@app.command()
def up(
    config: Annotated[Path, typer.Option("--config", "-c", help="Cluster description (YAML).")],
    run_dir: RunDir = DEFAULT_RUN_DIR,
    host: Annotated[
        str | None, typer.Option(help="Start the part of this one of the file's hosts, under Slurm or pdsh.")
    ] = None,
    otlp: Annotated[
        str | None,
        typer.Option(
            metavar="ENDPOINT",
            help="Send a copy of every span there, say to a Jaeger: HOST:4317, http://HOST:4318, grpcs://… or "
            "https://…",
        ),
    ] = None,
) -> None:
    """Start a whole cluster on this machine and keep it until Ctrl-C, or until an engine dies.

    Its other parts are started again when they die.  With --host every part that dies is.
    """
    from dualpath_sgl.launch.processes.process import ProcessDied
    from dualpath_sgl.launch.supervision.cluster import Cluster
    from dualpath_sgl.launch.supervision.host_part import HostPart
    from dualpath_sgl.launch.supervision.supervisor import StartTimeout
    from dualpath_sgl.launch.topology.network import NetworkError

    description = loaded(config)
    if otlp is not None:
        description = _traced_to(otlp, description)
    try:
        require_ready(description)
    except NotReady as error:
        fail(str(error))
    # Also SIGINT: a shell starts background jobs with it ignored.
    for stop_signal in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop_signal, signal.default_int_handler)
    try:
        cluster = Cluster(description, run_dir) if host is None else HostPart(description, host, run_dir)
    except ConfigError as error:
        fail(f"{config}: {error}")
    except OSError as error:
        fail(str(error))
    begun_s = time.monotonic()
    try:
        cluster.start(
            lambda text: console.print(f"[dim]{time.monotonic() - begun_s:6.1f} s[/]  {escape(text)}")
        )
        if isinstance(cluster, Cluster):
            for engine in cluster.engines:
                console.print(f"{engine.name}  {engine.url}")
        look = escape(f"dualpath status --run-dir {run_dir}")
        console.print(f"router  [bold]{cluster.url}[/]   look: {look}   stop: Ctrl-C")
        if description.tracing.enabled and description.tracing.otlp_endpoint:
            console.print(escape(_traces(description.tracing.otlp_endpoint)))
        cluster.wait()
    except KeyboardInterrupt:
        console.print("stopping")
    except RunDirError as error:
        fail(f"--run-dir {error}")
    except (ProcessDied, StartTimeout, NetworkError, OSError) as error:
        fail(str(error))
    finally:
        for stop_signal in (signal.SIGINT, signal.SIGTERM):
            signal.signal(stop_signal, signal.SIG_IGN)  # A second Ctrl-C must not cut the stopping short.
        cluster.stop()


@app.command()
def status(
    run_dir: RunDir = DEFAULT_RUN_DIR,
    scheduler: SchedulerAddress = None,
    key_file: KeyFile = None,
    scheduler_key_file: SchedulerKeyFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts; see above.")] = False,
) -> None:
    """Show the processes, addresses and scheduler state of a running cluster.

    Exit status 1 when a process has ended or answers nobody.

    --json prints one object; null is unknown:

    - name, mode, run_dir, url
    - processes: by name pid, state (running, silent, ended), address,
      log, restarts, last_end
    - scheduler (null in modes basic and both): policy, uptime_s,
      rooms_open, rooms_closed, rooms_forgotten, paths, fallbacks,
      duplicate_store_pages, errors, and engines: list of engine, role,
      rank, url, age_s, sequences, tokens, read_queue_bytes,
      read_rate_bytes_per_s, store_read_bytes, forwarded_bytes

    With --scheduler only the object under scheduler.
    """
    from dualpath_sgl.launch import status as told

    if (key_file is None) != (scheduler_key_file is None):
        fail("give both --key-file and --scheduler-key-file, or neither")
    keys = None if key_file is None or scheduler_key_file is None else (key_file, scheduler_key_file)
    if scheduler is not None:
        answer = _ask_scheduler(scheduler, keys)
        if as_json:
            print(json.dumps(told.scheduler_document(answer), indent=2))
        else:
            told.show_scheduler(answer, output())
        return
    try:
        state = read_state(run_dir)
    except RunDirError as error:
        fail(f"--run-dir {error}")
    if state is None:
        fail(
            f"--run-dir {run_dir}: no cluster runs there; start one: dualpath up -c FILE --run-dir {run_dir}"
        )
    if not as_json:
        told.show_processes(state, run_dir, output())
    found = None
    if state.scheduler is not None:
        found = _ask_scheduler(
            state.scheduler, keys if state.scheduler_keys is None else state.scheduler_keys
        )
    if as_json:
        document = told.cluster_document(state, run_dir)
        document["scheduler"] = None if found is None else told.scheduler_document(found)
        print(json.dumps(document, indent=2))
    elif found is not None:
        told.show_scheduler(found, output())
    if any(told.condition(process) != told.RUNNING for process in state.processes.values()):
        raise typer.Exit(1)


@app.command()
def doctor(
    flags: Annotated[
        list[str] | None, typer.Argument(metavar="[-- ENGINE FLAGS]", help="SGLang's flags of one engine.")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Cluster description (YAML).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The findings as JSON.")] = False,
) -> None:
    """Say what will not work here, and the remedy; exit status 1 when something will not."""
    from dataclasses import asdict

    from dualpath_sgl.launch.checks import doctor as doctor_

    found = doctor_.examine(loaded(config) if config is not None else None, flags or (), os.environ)
    if as_json:
        document = {"works": doctor_.works(found), "findings": [asdict(finding) for finding in found]}
        print(json.dumps(document, indent=2))
    else:
        doctor_.show(found, Console(highlight=False))
    if not doctor_.works(found):
        raise typer.Exit(1)


@app.command()
def setup(
    profile: Annotated[Profile, typer.Argument(help="What this machine's engines run on.")],
) -> None:
    """Install SGLang and everything else as it was tested, and patch it, in this Python environment."""
    from dualpath_sgl.launch.setup.install import SetupError, install

    try:
        install(profile, lambda command: console.print(escape(f"+ {command}")))
    except SetupError as error:
        fail(str(error))


@topology_app.callback()
def _several_commands() -> None:
    # Without a callback typer drops the name of an app's only command.
    pass


@topology_app.command("clean")
def topology_clean() -> None:
    """Remove shaped networks whose owner is dead.  Starting a cluster does the same."""
    from dualpath_sgl.launch.topology.network import NetworkError, clean

    removed: list[str] = []
    try:
        clean(removed.append)
    except NetworkError as error:
        fail(str(error))
    console.print("\n".join(f"removed {name}" for name in removed) or "nothing to remove")


@patch_app.command("apply")
def patch_apply(package: Package = None) -> None:
    """Apply the patches.  Idempotent; all of them or none."""
    _for_each_tree(package, lambda tree: tree.apply())


@patch_app.command("revert")
def patch_revert(package: Package = None) -> None:
    """Bring the packages back to what was installed.  Idempotent."""
    _for_each_tree(package, lambda tree: tree.revert())


@patch_app.command("check")
def patch_check(
    package: Package = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts; see above.")] = False,
) -> None:
    """Say what is applied; exit status 1 unless everything is.

    --json prints one object: applied (everything is), and packages: list
    of package, version, state (applied, not applied, half applied,
    outdated, modified by someone else), patches, files (state of each by its path).
    """
    reports = _for_each_tree(package, lambda tree: tree.check(), quiet=as_json)
    applied = all(report.state is State.APPLIED for report in reports)
    if as_json:
        print(json.dumps({"applied": applied, "packages": list(map(_document, reports))}, indent=2))
    if not applied:
        raise typer.Exit(1)


def _for_each_tree(package: str | None, act: Callable[[Tree], Report], quiet: bool = False) -> list[Report]:
    reports = []
    try:
        for stack in stacks(package):
            reports.append(act(Tree(stack)))
            if not quiet:
                _print_report(reports[-1])
    except PatchError as error:
        fail(str(error))
    if not reports and not quiet:
        console.print("no patches: nothing to do")
    return reports


def _print_report(report: Report) -> None:
    change = " (changed now)" if report.changed else ""
    console.print(
        f"{report.package} {report.version}: {report.state}{change}: {', '.join(report.patch_names)}"
    )
    for name, state in report.files.items():
        console.print(f"  {state:<24} {name}")


def _document(report: Report) -> dict[str, Any]:
    return {
        "package": report.package,
        "version": report.version,
        "state": report.state.value,
        "patches": list(report.patch_names),
        "files": {name: state.value for name, state in report.files.items()},
    }


def _ask_scheduler(address: str, keys: tuple[Path, Path] | None) -> Status:
    from scheduler_svc.wire.client import SchedulerClient, SchedulerError

    try:
        with SchedulerClient(address, curve_key_files=keys) as client:
            return client.status()
    except KeyFileError as error:
        fail(str(error))
    except TimeoutError as error:
        hint = "" if keys else ", or it wants keys (--key-file, --scheduler-key-file)"
        fail(f"scheduler: {error}: it is away{hint}; engines go on with the prefill path")
    except SchedulerError as error:
        fail(f"scheduler: {error}; engines go on with the prefill path")


def _traces(endpoint: str) -> str:
    """Where a copy of them goes, and whether anybody is there."""
    from dualpath_sgl.launch.config.otlp import parsed

    there = parsed(endpoint)
    try:
        socket.create_connection((there.host, there.port), LISTENS_S).close()
    except OSError:
        return f"traces  nothing listens at {there.target} yet; what waits is sent when it does"
    return f"traces  {there.target}"


def _traced_to(endpoint: str, description: ClusterConfig) -> ClusterConfig:
    from dualpath_sgl.launch.config.otlp import checked_otlp

    try:
        tracing = {"enabled": True, "otlp_endpoint": checked_otlp(endpoint)}
    except ValueError as error:
        fail(f"--otlp {endpoint!r}: {error}")
    return description.model_copy(update={"tracing": description.tracing.model_copy(update=tracing)})
