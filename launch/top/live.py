"""Looks again and again, and shows it: on a terminal until Ctrl-C, elsewhere once."""

from __future__ import annotations

import json
import signal
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from rich.live import Live

from dualpath_sgl.launch.processes.run_dir import RunDirError, read_state
from dualpath_sgl.launch.top.figures import Figures, figures
from dualpath_sgl.launch.top.reading import Looker, Reading, metrics_url
from dualpath_sgl.launch.top.view import Screen
from dualpath_sgl.terminal.console import output
from scheduler_svc.wire.keys import KeyFileError

LOOKS = 4
"""Rates are over so many: engines write their counts once a second, and batches come in lumps."""
Keys = tuple[Path, Path]


class CannotLook(ValueError):
    """Names what was asked for and the remedy."""


def show(
    run_dir: Path,
    scheduler: str | None,
    urls: tuple[str, ...],
    keys: Keys | None,
    interval_s: float,
    as_json: bool,
) -> None:
    """`scheduler` and `urls` of metrics count before `run_dir`.  Raises CannotLook."""
    if scheduler is None and not urls:
        scheduler, found_keys, urls = _of_run(run_dir)
        keys = keys or found_keys
    try:
        looker = Looker(scheduler, keys, urls)
    except KeyFileError as error:
        raise CannotLook(str(error)) from None
    # Also SIGINT: a shell starts background jobs with it ignored.
    for stop_signal in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop_signal, signal.default_int_handler)
    console = output()
    with looker, suppress(KeyboardInterrupt):
        frames = _frames(looker, interval_s)
        if console.is_terminal and not as_json:
            with Live(console=console, screen=True, auto_refresh=False) as live:
                for frame in frames:
                    live.update(Screen(frame, fills_terminal=True), refresh=True)
        next(frames)
        frame = next(frames)
        if as_json:
            print(json.dumps(frame.document(), indent=2))
        else:
            console.print(Screen(frame, fills_terminal=False))


def _frames(looker: Looker, interval_s: float) -> Iterator[Figures]:
    seen: deque[Reading] = deque(maxlen=LOOKS)
    while True:
        seen.append(looker.look())
        yield figures(seen[0], seen[-1])
        time.sleep(interval_s)


def _of_run(run_dir: Path) -> tuple[str | None, Keys | None, tuple[str, ...]]:
    """Scheduler, keys and metrics addresses of the cluster that runs there."""
    try:
        state = read_state(run_dir)
    except RunDirError as error:
        raise CannotLook(str(error)) from None
    if state is None:
        raise CannotLook(
            f"--run-dir {run_dir}: no cluster runs there; name a --scheduler or --metrics, or start one: "
            f"dualpath up -c FILE --run-dir {run_dir}"
        )
    return state.scheduler, state.scheduler_keys, tuple(map(metrics_url, state.engines.values()))
