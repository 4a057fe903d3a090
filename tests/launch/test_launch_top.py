"""`dualpath top`: figures of two looks, at any width, of real processes, until Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from msgspec.structs import replace
from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from rich.console import Console
from test_launch_status import rank, relay, seen

from dualpath_sgl.control.channel import ControlChannel
from dualpath_sgl.launch.top.figures import figures
from dualpath_sgl.launch.top.reading import Reading, parsed
from dualpath_sgl.launch.top.view import Screen, lines
from dualpath_sgl.metrics.rank import RankMetrics
from scheduler_svc.wire.client import SchedulerClient
from scheduler_svc.wire.protocol import Outcome, Path, RankInfo, Role, Workload

WAIT_S = 60.0


class EngineRank:
    """Counts as an engine's rank does, in a registry of its own."""

    def __init__(
        self, name: str = "prefill-0", role: Role = Role.PREFILL, number: int = 0, url: str = "http://h:1"
    ):
        self.registry = CollectorRegistry()
        self.info = RankInfo(
            engine_id=name,
            role=role,
            rank=number,
            tp_size=2,
            url=url,
            fingerprint="f",
            page_size=16,
            page_bytes=1000,
        )
        self.metrics = RankMetrics(self.info, self.registry)
        self._arrived = {"store": 0, "peer": 0}

    def loads(self, store_bytes: int, peer_bytes: int = 0) -> None:
        self._arrived = {
            "store": self._arrived["store"] + store_bytes,
            "peer": self._arrived["peer"] + peer_bytes,
        }
        self.metrics.links(self._arrived, None)

    def serves(self, prompt_pages: int, **pages: int) -> None:
        from dualpath_sgl.metrics.prompts import Over

        known = {"device": 0, "host": 0} | pages
        self.metrics._prompt_over(Over(prompt_pages, sum(pages.values()), "split", known))

    def read(self) -> dict:
        return parsed(generate_latest(self.registry).decode())


# -- figures -------------------------------------------------------------------------------------------


def test_rates_are_growth_over_the_time_between_two_looks():
    one, other = EngineRank(number=0), EngineRank(number=1)
    for each in (one, other):
        each.loads(store_bytes=500, peer_bytes=7)
    before = Reading(10.0, None, ranks=one.read() | other.read())
    one.loads(store_bytes=3000)
    other.loads(store_bytes=1000, peer_bytes=400)
    found = figures(before, Reading(12.0, None, ranks=one.read() | other.read()))
    assert found.over_s == 2
    (engine,) = found.engines
    assert engine.links_bytes_per_s == {"store": 2000, "relay": 0, "peer": 200}
    assert found.links_bytes_per_s == {"store": 2000, "relay": 0, "peer": 200, "relay reads": 0}


def test_an_engine_that_was_started_again_or_is_new_has_no_negative_and_no_false_rate():
    old = EngineRank()
    old.loads(store_bytes=10_000)
    again, new = EngineRank(), EngineRank("decode-0", Role.DECODE)
    again.loads(store_bytes=300)
    new.loads(store_bytes=10_000)
    found = figures(Reading(0.0, None, ranks=old.read()), Reading(1.0, None, ranks=again.read() | new.read()))
    assert {one.engine: one.links_bytes_per_s["store"] for one in found.engines} == {
        "prefill-0": 300,
        "decode-0": 0,
    }


def test_the_hit_rate_is_that_of_now_and_while_nothing_comes_that_since_the_start():
    engine = EngineRank()
    engine.serves(100, store=20, device=10)
    before = Reading(0.0, None, ranks=engine.read())
    engine.serves(10, peer=9)
    now = Reading(1.0, None, ranks=engine.read())
    assert figures(before, now).hit_rate == pytest.approx(9 / 10)
    assert figures(now, now).hit_rate == pytest.approx(39 / 110)
    assert figures(now, now).pages == {"device": 10, "host": 0, "peer": 9, "store": 20, "recomputed": 0}
    assert figures(Reading(0.0, None), Reading(1.0, None)).hit_rate is None


def test_without_metrics_of_engines_the_scheduler_tells_what_it_knows():
    old = seen(rank("p", Role.PREFILL), rank("d", Role.DECODE))
    new = seen(rank("p", Role.PREFILL, store_read_bytes=204_500_000 + 4000), rank("d", Role.DECODE))
    found = figures(Reading(0.0, old), Reading(2.0, new, silent=("http://h:1/metrics",)))
    assert [one.links_bytes_per_s["store"] for one in found.engines] == [2000, 0]
    assert found.silent == ["http://h:1/metrics"] and not found.engines[0].answers
    assert found.fallbacks == {"prefetch deadline passed": 3}


def test_while_the_scheduler_is_away_engines_tell_of_themselves():
    engine = EngineRank()
    engine.metrics.now(Workload(sequences=4, tokens=900, read_queue_bytes=50))
    engine.metrics.room_over("r", None, Outcome.FALLBACK, "scheduler away", [])
    found = figures(Reading(0.0, None), Reading(1.0, None, problem="no answer", ranks=engine.read()))
    (one,) = found.engines
    assert (one.sequences, one.tokens, one.queued_bytes, one.connected, one.mode) == (
        4,
        900,
        50,
        False,
        "decode-side",
    )
    assert (found.scheduler, found.fallbacks) == ("no answer", {"scheduler away": 1})


# -- lines ---------------------------------------------------------------------------------------------


def busy():
    """A cluster with much to tell."""
    engines = [EngineRank("prefill-0"), EngineRank("decode-0", Role.DECODE)]
    before = Reading(0.0, seen(), ranks=engines[0].read() | engines[1].read())
    engines[0].loads(store_bytes=2_500_000_000, peer_bytes=1_250_000_000)
    engines[0].serves(100, store=50, peer=30, host=10, recomputed=2)
    for each in engines:
        each.metrics.connected.set(1)
    status = replace(
        seen(),
        relays=(relay("relay-0", ring_free_bytes=64_000_000),),
        paths={Path.PREFILL: 20, Path.SPLIT: 19},
    )
    return figures(before, Reading(2.0, status, ranks=engines[0].read() | engines[1].read()))


@pytest.mark.parametrize("width", [80, 120, 200])
def test_no_line_is_wider_than_the_terminal_and_no_number_is_cut(width):
    told = [line.plain.rstrip() for line in lines(busy(), width)]
    assert max(map(len, told)) <= width and "…" not in "".join(told)
    (prefill,) = [line for line in told if line.startswith("prefill-0")]
    assert prefill.split() == [
        "prefill-0", "decode-side", "412", "ms", "4", "5231", "27.8", "MB", "1.250", "0.000", "0.625",
    ]  # fmt: skip
    assert "paths  " in told[2] and "prefill 25" in told[2] and "split 75" in told[2]
    assert "recomputed 2" in told[3] and "hit 92 %" in told[0]
    (relay_line,) = [line for line in told if line.startswith("relay-0")]
    assert relay_line.split()[-2:] == ["25", "%"]


def test_a_name_that_moves_the_cursor_does_not():
    told = seen(rank("p\x1b[2J", Role.PREFILL))
    text = "".join(line.plain for line in lines(figures(Reading(0.0, told), Reading(1.0, told)), 80))
    assert "\x1b" not in text


def test_engines_that_find_no_line_are_counted():
    told = seen(*(rank(f"prefill-{number}", Role.PREFILL) for number in range(40)))
    found = figures(Reading(0.0, told), Reading(1.0, told))
    console = Console(width=80, height=24, file=io.StringIO(), record=True)
    console.print(Screen(found, fills_terminal=True))
    shown = console.export_text().splitlines()
    assert len(shown) <= 23 and shown[-1] == "and 26 more; --json shows all"


# -- real processes ------------------------------------------------------------------------------------


@contextmanager
def scheduler(port: int = 0) -> Iterator[tuple[subprocess.Popen, str]]:
    command = [sys.executable, "-m", "scheduler_svc", "--bind", f"tcp://127.0.0.1:{port}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process, process.stdout.readline().split()[-1]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def cluster() -> Iterator[tuple[subprocess.Popen, str, str]]:
    """A scheduler, and an engine's rank that heartbeats and counts: scheduler, its address, the rank's metrics."""
    registry = CollectorRegistry()
    server, thread = start_http_server(0, "127.0.0.1", registry)
    url = f"http://127.0.0.1:{server.server_port}"
    engine = EngineRank(url=url)
    registry.register(engine.registry)
    engine.serves(10, store=6, peer=2)
    engine.metrics.now(Workload(sequences=3))
    with scheduler() as (process, address):
        channel = ControlChannel(address, replace(engine.info, tp_size=1))
        channel.serve(lambda: Workload(sequences=3), print, print)
        try:
            deadline_s = time.monotonic() + WAIT_S
            with SchedulerClient(address) as client:
                while not client.status(WAIT_S).engines:
                    assert time.monotonic() < deadline_s
                    time.sleep(0.02)
            yield process, address, f"{url}/metrics"
        finally:
            channel.stop()
            server.shutdown()
            server.server_close()
            thread.join()


def top(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "dualpath_sgl.cli", "top", "--interval", "0.2", *options],
        env=os.environ | {"COLUMNS": "80"}, capture_output=True, text=True,
    )  # fmt: skip


def test_one_snapshot_of_a_scheduler_and_its_engine_and_without_the_scheduler_of_the_engine(cluster):
    process, address, metrics = cluster
    found = json.loads(top("--json", "--scheduler", address, "--metrics", metrics).stdout)
    (engine,) = found["engines"]
    assert (engine["engine"], engine["sequences"], engine["answers"]) == ("prefill-0", 3, True)
    assert (found["scheduler"], found["hit_rate"], found["pages"]["store"]) == ("answers", 0.8, 6)

    process.kill()
    process.wait()
    away = top("--scheduler", address, "--metrics", metrics)
    assert away.returncode == 0 and max(map(len, away.stdout.splitlines())) <= 80
    assert "scheduler away: " in away.stdout and "store 75" in away.stdout


def test_a_cluster_that_is_not_there_is_told_with_the_remedy(tmp_path):
    asked = top("--run-dir", str(tmp_path))
    assert asked.returncode == 1 and "no cluster runs there" in asked.stderr


def test_ctrl_c_ends_it_cleanly_and_gives_the_terminal_back(cluster):
    _, address, _ = cluster
    ours, theirs = pty.openpty()
    running = subprocess.Popen(
        [sys.executable, "-m", "dualpath_sgl.cli", "top", "--interval", "0.2", "--scheduler", address],
        env=os.environ | {"COLUMNS": "80", "LINES": "24", "TERM": "xterm-256color"},
        stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    try:
        shown = read_until(ours, r"prefill-0")
        assert "\x1b[?1049h" in shown, "it draws on a screen of its own"
        running.send_signal(signal.SIGINT)
        shown += read_until(ours, r"\x1b\[\?1049l")
        assert running.wait(WAIT_S) == 0
        shown += rest(ours)
    finally:
        running.kill()
        running.wait()
        os.close(ours)
    assert "Traceback" not in shown and "\x1b[?25h" in shown, "the cursor is back"


def rest(terminal: int) -> str:
    """What nobody at the other end adds to any more."""
    text = b""
    with suppress(OSError):
        while got := os.read(terminal, 65536):
            text += got
    return text.decode(errors="replace")


def read_until(terminal: int, pattern: str) -> str:
    text, deadline_s = "", time.monotonic() + WAIT_S
    while not re.search(pattern, text):
        assert time.monotonic() < deadline_s, text
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                text += os.read(terminal, 65536).decode(errors="replace")
            except OSError:  # nobody holds the other end any more
                assert re.search(pattern, text), text
    return text
