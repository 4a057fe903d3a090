"""What `dualpath status` says: for people, and for scripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from dualpath_sgl.launch.processes.run_dir import ClusterState, ProcessState
from dualpath_sgl.terminal.columns import Column, plain, print_columns
from dualpath_sgl.terminal.units import duration, rate, size
from scheduler_svc.wire.protocol import EngineStatus, RelayStatus, Status

RUNNING, SILENT, ENDED = "running", "silent", "ended"
TOLD = {RUNNING: "running", SILENT: "DOES NOT ANSWER", ENDED: "ended"}
"""For people."""
ALARM = "red"


def condition(process: ProcessState) -> str:
    """RUNNING, SILENT (it runs, but answers nobody) or ENDED."""
    if not process.alive:
        return ENDED
    return SILENT if process.silent else RUNNING


def show_processes(state: ClusterState, run_dir: Path, console: Console) -> None:
    console.print(plain(f"{state.name}  mode {state.mode}  {run_dir}"))
    addresses = _addresses(state)
    columns = [
        Column("process"),
        Column("pid", right=True),
        Column("state"),
        Column("address"),
        Column("log"),
    ]
    rows: list[list[str | Text]] = []
    for name, process in state.processes.items():
        now = condition(process)
        rows.append(
            [
                name,
                "-" if process.pid is None else str(process.pid),
                Text(TOLD[now], style="" if now == RUNNING else ALARM),
                addresses.get(name) or "",
                _below(Path(process.log), run_dir),
            ]
        )
    print_columns(console, columns, rows)
    for name, process in state.processes.items():
        if process.last_end:
            times = "once" if process.restarts == 1 else f"{process.restarts} times"
            now = TOLD[condition(process)]
            text = f"{name}: {now}; started again {times}, last: {process.last_end}"
            console.print(plain(text), style=ALARM)


def show_scheduler(found: Status, console: Console) -> None:
    columns = [Column("engine"), *(Column(title, right=True) for title in _FIGURES), Column("")]
    print_columns(console, columns, [_row(rank) for rank in found.engines])
    if found.relays:
        columns = [Column("relay"), *(Column(title, right=True) for title in _RELAY_FIGURES), Column("state")]
        print_columns(console, columns, [_relay_row(relay) for relay in found.relays])
    for line in _sums(found):
        console.print(plain(line))


_FIGURES = ("seen", "requests", "tokens", "queued", "read rate", "store read", "forwarded")


def _row(rank: EngineStatus) -> list[str]:
    load = rank.load
    several = rank.engine.tp_size > 1
    return [
        f"{rank.engine.engine_id}.{rank.engine.rank}" if several else rank.engine.engine_id,
        f"{duration(rank.age_s)} ago",
        str(load.sequences),
        str(load.tokens),
        size(load.read_queue_bytes),
        rate(load.read_rate_bytes_per_s) if load.read_rate_bytes_per_s else "-",
        size(rank.store_read_bytes),
        size(rank.forwarded_bytes),
        "",
    ]


_RELAY_FIGURES = ("seen", "engines", "queued", "read rate", "read", "ring free")


def _relay_row(relay: RelayStatus) -> list[str]:
    load = relay.load
    return [
        relay.relay.name,
        f"{duration(relay.age_s)} ago",
        str(load.clients),
        size(load.queue_bytes),
        rate(load.read_rate_bytes_per_s) if load.read_rate_bytes_per_s else "-",
        size(load.read_bytes),
        size(load.ring_free_bytes),
        "draining" if load.draining else "serving",
    ]


def _sums(found: Status) -> Iterator[str]:
    rooms = f"rooms open {found.rooms_open}, closed {found.rooms_closed}, forgotten {found.rooms_forgotten}"
    yield f"policy {found.policy}  up {duration(found.uptime_s)}  {rooms}"
    modes = Counter(rank.engine.mode for rank in found.engines)
    yield "modes: " + (", ".join(f"{mode} {count}" for mode, count in sorted(modes.items())) or "none yet")
    yield "paths: " + (", ".join(f"{path} {count}" for path, count in found.paths.items()) or "none yet")
    fallbacks = ", ".join(f"{reason} {count}" for reason, count in found.fallbacks.items())
    yield f"fallbacks: {fallbacks or 'none'}"
    yield f"pages read twice: {found.duplicate_store_pages}  errors: {found.errors}"


def cluster_document(state: ClusterState, run_dir: Path) -> dict[str, Any]:
    """The processes, in the fields that `dualpath status --help` names."""
    addresses = _addresses(state)
    return {
        "name": state.name,
        "mode": state.mode,
        "run_dir": str(run_dir),
        "url": state.url,
        "processes": {
            name: {
                "pid": process.pid,
                "state": condition(process),
                "address": addresses.get(name),
                "log": process.log,
                "restarts": process.restarts,
                "last_end": process.last_end or None,
            }
            for name, process in state.processes.items()
        },
    }


def scheduler_document(found: Status) -> dict[str, Any]:
    return {
        "policy": found.policy,
        "uptime_s": found.uptime_s,
        "rooms_open": found.rooms_open,
        "rooms_closed": found.rooms_closed,
        "rooms_forgotten": found.rooms_forgotten,
        "paths": {path.value: count for path, count in found.paths.items()},
        "fallbacks": dict(found.fallbacks),
        "duplicate_store_pages": found.duplicate_store_pages,
        "errors": found.errors,
        "engines": [
            {
                "engine": rank.engine.engine_id,
                "role": rank.engine.role.value,
                "rank": rank.engine.rank,
                "mode": rank.engine.mode.value,
                "url": rank.engine.url,
                "age_s": rank.age_s,
                "sequences": rank.load.sequences,
                "tokens": rank.load.tokens,
                "read_queue_bytes": rank.load.read_queue_bytes,
                "read_rate_bytes_per_s": rank.load.read_rate_bytes_per_s,
                "store_read_bytes": rank.store_read_bytes,
                "forwarded_bytes": rank.forwarded_bytes,
            }
            for rank in found.engines
        ],
        "relays": [
            {
                "relay": relay.relay.name,
                "endpoint": relay.relay.endpoint,
                "age_s": relay.age_s,
                "draining": relay.load.draining,
                "clients": relay.load.clients,
                "queue_bytes": relay.load.queue_bytes,
                "read_rate_bytes_per_s": relay.load.read_rate_bytes_per_s,
                "read_bytes": relay.load.read_bytes,
                "ring_bytes": relay.relay.ring_bytes,
                "ring_free_bytes": relay.load.ring_free_bytes,
            }
            for relay in found.relays
        ],
    }


def _addresses(state: ClusterState) -> dict[str, str | None]:
    return {**state.engines, **state.relays, "router": state.url, "scheduler": state.scheduler}


def _below(path: Path, folder: Path) -> str:
    """Relative to `folder`, which the heading names, where it lies in it."""
    try:
        return str(path.resolve().relative_to(folder.resolve()))
    except ValueError:
        return str(path)
