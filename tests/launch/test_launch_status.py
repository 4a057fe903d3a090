"""What `dualpath status` shows of a cluster, at any width and as JSON."""

import io
import os
from pathlib import Path

import psutil
import pytest
from msgspec.structs import replace
from rich.console import Console

from dualpath_sgl.launch.processes.run_dir import ClusterState, ProcessState
from dualpath_sgl.launch.status import cluster_document, scheduler_document, show_processes, show_scheduler
from scheduler_svc.wire import protocol
from scheduler_svc.wire.protocol import (
    EngineStatus,
    RelayInfo,
    RelayLoad,
    RelayStatus,
    Role,
    Status,
    Workload,
)

WIDTHS = (80, 120, 200)
RUN_DIR = Path("/srv/dualpath/runs/current")
URL = "http://127.0.0.1:30000"


def process(name: str, **changes) -> ProcessState:
    own = {"pid": os.getpid(), "started_s": psutil.Process().create_time()}
    return ProcessState(**{**own, "log": str(RUN_DIR / "logs" / f"{name}.log"), **changes})


def state(**changes: dict) -> ClusterState:
    names = ("master", "collector", "scheduler", "store", "prefill-0", "decode-0", "router")
    return ClusterState(
        name="demo",
        mode="decode-side",
        url="http://127.0.0.1:30099",
        scheduler="tcp://127.0.0.1:5557",
        engines={"prefill-0": URL, "decode-0": URL},
        processes={name: process(name, **changes.get(name.replace("-", "_"), {})) for name in names},
    )


def rank(name: str, role: Role, number: int = 0, tp_size: int = 1, **changes) -> EngineStatus:
    described = protocol.RankInfo(
        engine_id=name,
        role=role,
        rank=number,
        tp_size=tp_size,
        url=URL,
        fingerprint="f",
        page_size=16,
        page_bytes=1,
    )
    load = Workload(sequences=4, tokens=5231, read_queue_bytes=27_787_264, read_rate_bytes_per_s=12.5e6)
    values = {"age_s": 0.412, "store_read_bytes": 204_500_000, "forwarded_bytes": 474_000_000, **changes}
    return EngineStatus(engine=described, load=load, **values)


def seen(*ranks: EngineStatus) -> Status:
    return Status(
        policy="split",
        uptime_s=4000,
        engines=ranks or (rank("prefill-0", Role.PREFILL), rank("decode-0", Role.DECODE)),
        rooms_open=2,
        rooms_closed=78,
        paths={protocol.Path.PREFILL: 19, protocol.Path.SPLIT: 16},
        fallbacks={"prefetch deadline passed": 3},
        duplicate_store_pages=0,
        errors=1,
    )


def relay(name: str, **load) -> RelayStatus:
    return RelayStatus(
        RelayInfo(name=name, endpoint="tcp://127.0.0.1:4700", ring_bytes=256_000_000),
        RelayLoad(
            clients=2, queue_bytes=12_582_912, read_rate_bytes_per_s=40e6, read_bytes=91_000_000, **load
        ),
        age_s=0.25,
    )


def printed(show, *arguments, width: int) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    show(*arguments, console)
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", WIDTHS)
def test_each_process_has_a_line_with_its_state_and_log(width):
    lines = printed(show_processes, state(), RUN_DIR, width=width)
    assert lines[0] == f"demo  mode decode-side  {RUN_DIR}"
    assert max(map(len, lines)) <= width and len(lines) == 2 + 7
    router = next(line for line in lines if line.startswith("router"))
    assert router.split() == [
        "router",
        str(os.getpid()),
        "running",
        "http://127.0.0.1:30099",
        "logs/router.log",
    ]


def test_processes_that_ended_or_hang_or_came_back_are_told():
    troubled = state(
        store={"started_s": 1.0},
        decode_0={"silent": True},
        master={"restarts": 2, "last_end": "ended with exit status 1"},
    )
    lines = printed(show_processes, troubled, RUN_DIR, width=80)
    assert "ended" in next(line for line in lines if line.startswith("store"))
    assert "DOES NOT ANSWER" in next(line for line in lines if line.startswith("decode-0"))
    assert lines[-1] == "master: running; started again 2 times, last: ended with exit status 1"


@pytest.mark.parametrize("width", WIDTHS)
def test_each_engine_has_a_line_with_units_and_paths_and_fallbacks_follow(width):
    lines = printed(show_scheduler, seen(), width=width)
    assert max(map(len, lines)) <= width
    engine = next(line for line in lines if line.startswith("prefill-0"))
    for part in ("412 ms ago", " 4 ", "5231", "27.8 MB", "12.5 MB/s", "204 MB", "474 MB"):
        assert part in engine
    assert "paths: prefill 19, split 16" in lines
    assert "fallbacks: prefetch deadline passed 3" in lines
    assert "policy split  up 1 h 7 min  rooms open 2, closed 78, forgotten 0" in lines


def test_ranks_of_one_engine_are_told_apart():
    lines = printed(show_scheduler, seen(*(rank("p", Role.PREFILL, n, 2) for n in (0, 1))), width=80)
    assert [line.split()[0] for line in lines[1:3]] == ["p.0", "p.1"]


@pytest.mark.parametrize("width", WIDTHS)
def test_each_relay_has_a_line_with_what_it_does(width):
    found = replace(seen(), relays=(relay("relay-a", ring_free_bytes=9_000_000), relay("b", draining=True)))
    lines = printed(show_scheduler, found, width=width)
    assert max(map(len, lines)) <= width
    first, second = (line for line in lines if line.startswith(("relay-a", "b ")))
    for part in ("250 ms ago", " 2 ", "12.6 MB", "40.0 MB/s", "91.0 MB", "9.00 MB", "serving"):
        assert part in first
    assert "draining" in second
    assert "modes: decode-side 2" in lines
    document = scheduler_document(found)["relays"]
    assert [(one["relay"], one["draining"], one["read_bytes"]) for one in document] == [
        ("relay-a", False, 91_000_000),
        ("b", True, 91_000_000),
    ]


def test_scripts_get_everything_that_people_see():
    document = cluster_document(state(store={"started_s": 1.0}), RUN_DIR)
    assert document["processes"]["store"]["state"] == "ended"
    assert document["processes"]["router"] == {
        "pid": os.getpid(),
        "state": "running",
        "address": "http://127.0.0.1:30099",
        "log": str(RUN_DIR / "logs/router.log"),
        "restarts": 0,
        "last_end": None,
    }
    found = scheduler_document(seen())
    assert (found["policy"], found["paths"]) == ("split", {"prefill": 19, "split": 16})
    assert found["fallbacks"] == {"prefetch deadline passed": 3}
    decode = found["engines"][1]
    assert (decode["engine"], decode["role"], decode["read_queue_bytes"]) == (
        "decode-0",
        "decode",
        27_787_264,
    )
