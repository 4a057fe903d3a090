"""Parts of a running cluster that die: which come back, when, and which end the cluster."""

import http.server
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import MappingProxyType

import pytest

from dualpath_sgl.launch.config.cluster import load
from dualpath_sgl.launch.processes.ports import FreePorts
from dualpath_sgl.launch.processes.process import ProcessDied
from dualpath_sgl.launch.supervision import comeback
from dualpath_sgl.launch.supervision.cluster import Cluster
from dualpath_sgl.launch.supervision.comeback import MANY_DEATHS, Comeback
from dualpath_sgl.launch.supervision.direct_http import answers
from dualpath_sgl.launch.supervision.engine_watch import EngineWatch
from dualpath_sgl.launch.supervision.supervisor import Supervisor
from scheduler_svc.wire.client import SchedulerClient

PATIENCE_S = 30.0
SLEEP = "import time; print('up', flush=True); time.sleep(600)"
CLUSTERS = Path(__file__).parents[2] / "launch" / "clusters"


def until(condition) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.02)


class WithScheduler(Supervisor):
    """A real scheduler and a stand-in for an engine."""

    spared = MappingProxyType({"scheduler": "engines go on"})

    def __init__(self, run_dir: Path):
        super().__init__(run_dir)
        self.address = f"tcp://127.0.0.1:{FreePorts('127.0.0.1').take()}"
        self.events: list[str] = []
        self.problem: BaseException | None = None

    def _start(self) -> None:
        environment = dict(os.environ)
        scheduler = [sys.executable, "-m", "scheduler_svc", f"--bind={self.address}"]
        self._launch("scheduler", scheduler, environment, lambda: "scheduler" in self.processes)
        engine = [sys.executable, "-c", SLEEP]
        self._launch("engine", engine, environment, lambda: self.processes["engine"].tail() == "up")
        self._await_ready(["engine"], timeout_s=PATIENCE_S)

    def wait_aside(self) -> threading.Thread:
        def wait() -> None:
            try:
                self.wait()
            except ProcessDied as error:
                self.problem = error

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        return thread

    def die(self, name: str) -> None:
        """As by the kernel: nobody asked for it."""
        os.kill(self.processes[name].pid, signal.SIGKILL)


@pytest.fixture
def part(tmp_path):
    supervisor = WithScheduler(tmp_path)
    supervisor.start(supervisor.events.append)
    with supervisor:
        yield supervisor


def said(part: WithScheduler, *words: str) -> bool:
    return any(all(word in event for word in words) for event in part.events)


def test_a_killed_scheduler_is_started_again_at_its_address_and_the_engine_goes_on(part):
    part.wait_aside()
    with SchedulerClient(part.address) as client:
        client.status(PATIENCE_S)
        engine = part.processes["engine"].pid
        part.die("scheduler")
        until(lambda: said(part, "scheduler started again"))
        client.status(PATIENCE_S)  # the same socket: it has connected again by itself
    assert said(part, "scheduler was killed by SIGKILL; engines go on; it is started again in 0.5 s")
    assert part.processes["engine"].pid == engine and part.processes["engine"].running
    assert part.problem is None


def test_a_scheduler_that_dies_again_and_again_is_an_error_with_its_last_lines_and_not_the_end(
    part, monkeypatch
):
    monkeypatch.setattr(comeback, "FIRST_DELAY_S", 0.01)
    part.processes["scheduler"].argv = [sys.executable, "-c", "print('no room left'); raise SystemExit(3)"]
    watching = part.wait_aside()
    part.die("scheduler")
    until(lambda: said(part, f"died {MANY_DEATHS} times in a row", "no room left"))
    assert sum("in a row" in event for event in part.events) == 1
    assert said(part, "error: scheduler ended with status 3")
    assert watching.is_alive() and part.processes["engine"].running


def test_a_dead_engine_ends_the_wait_with_its_name(part):
    watching = part.wait_aside()
    part.die("engine")
    watching.join(PATIENCE_S)
    assert "engine was killed by SIGKILL" in str(part.problem)


def test_a_part_that_was_killed_on_purpose_is_left_alone(part):
    part.wait_aside()
    part.kill("scheduler")
    time.sleep(5 * 0.2)
    assert not said(part, "started again") and not part.processes["scheduler"].running


def test_an_error_of_a_measurement_names_a_dead_part_even_if_it_could_come_back(part):
    part.die("scheduler")
    until(lambda: not part.processes["scheduler"].running)
    with pytest.raises(ProcessDied, match="scheduler was killed by SIGKILL"):
        part.check()


def test_a_stopped_supervisor_leaves_no_part_that_came_back(part):
    part.wait_aside()
    part.die("scheduler")
    until(lambda: said(part, "scheduler started again"))
    process = part.processes["scheduler"]
    part.stop()
    assert process.pid is None


def test_every_part_but_the_engines_comes_back(tmp_path):
    cluster = Cluster(load(CLUSTERS / "cpu-2p2d.yaml"), tmp_path)
    assert set(cluster.spared) == {"scheduler", "collector", "router", "master", "store"}


def test_the_next_start_is_put_off_longer_with_every_death_and_sooner_again_after_a_quiet_minute():
    part = Comeback()
    delays_s = [part.died(now_s=float(i)) for i in range(9)]
    assert delays_s == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert part.died(now_s=8.0 + 30 + comeback.MEMORY_S) == 30
    assert part.died(now_s=1000.0) == 0.5


ENGINE = """
    import http.server, sys
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200); self.end_headers()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Answer)
    server.serve_forever()
"""


def test_an_engine_that_hangs_is_noticed_and_so_is_its_return(monkeypatch):
    monkeypatch.setattr("dualpath_sgl.launch.supervision.engine_watch.ANSWER_WITHIN_S", 0.2)
    port = FreePorts("127.0.0.1").take()
    engine = subprocess.Popen([sys.executable, "-c", textwrap.dedent(ENGINE), str(port)])
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: answers(url, timeout_s=1.0))
        with EngineWatch({"prefill-0": url}, interval_s=0.05, silent_after_s=1.0) as watch:
            assert watch.silent() == set()
            engine.send_signal(signal.SIGSTOP)
            until(lambda: watch.silent() == {"prefill-0"})
            engine.send_signal(signal.SIGCONT)
            until(lambda: watch.silent() == set())
    finally:
        engine.kill()
        engine.wait()


class Refusing(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503)
        self.end_headers()

    def log_message(self, *_) -> None:
        pass


def test_an_engine_that_says_itself_that_it_is_unwell_does_not_answer():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert not answers(f"http://127.0.0.1:{server.server_port}", timeout_s=5.0)
    finally:
        server.shutdown()
