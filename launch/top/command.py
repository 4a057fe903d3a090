"""The options of `dualpath top`.  What it needs is imported when it is called: completion of the others stays quick."""

from __future__ import annotations

from typing import Annotated

import typer

from dualpath_sgl.launch.options import (
    DEFAULT_RUN_DIR,
    KeyFile,
    RunDir,
    SchedulerAddress,
    SchedulerKeyFile,
    fail,
)


def top(
    run_dir: RunDir = DEFAULT_RUN_DIR,
    scheduler: SchedulerAddress = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(help="Metrics address of an engine (http://HOST:PORT/metrics); needs no scheduler."),
    ] = None,
    key_file: KeyFile = None,
    scheduler_key_file: SchedulerKeyFile = None,
    interval_s: Annotated[
        float, typer.Option("--interval", min=0.2, help="Seconds between two looks.")
    ] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="One snapshot for scripts; see above.")] = False,
) -> None:
    """Show what a cluster does right now, until Ctrl-C: engines, queues, links, paths, hits, faults.

    A pipe gets one frame.  The scheduler may be away: engines are asked too.

    --json looks twice, --interval apart, and prints one object; null is
    unknown:

    - over_s, scheduler (answers, or why not), policy, rooms_open
    - engines: list of engine, role, mode, age_s, connected, sequences,
      tokens, queued_bytes, links_bytes_per_s (store, relay, peer),
      faults, held, answers
    - relays: list of relay, age_s, clients, queued_bytes,
      read_bytes_per_s, ring_free_bytes, ring_bytes, draining, faults
    - links_bytes_per_s, paths, paths_now, pages (by source), hit_rate,
      fallbacks, faults, silent (metrics addresses)
    """
    from dualpath_sgl.launch.top.live import CannotLook, show

    if (key_file is None) != (scheduler_key_file is None):
        raise typer.BadParameter("give both, or neither", param_hint="--key-file, --scheduler-key-file")
    keys = None if key_file is None or scheduler_key_file is None else (key_file, scheduler_key_file)
    try:
        show(run_dir, scheduler, tuple(metrics or ()), keys, interval_s, as_json)
    except CannotLook as error:
        fail(str(error))
