"""Children of a supervisor: real processes, small ones."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest

from dualpath_sgl.launch.processes.process import ManagedProcess, ProcessDied, stop_all
from dualpath_sgl.launch.supervision.supervisor import StartTimeout, Supervisor

PATIENCE_S = 30.0


def until(condition) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.02)


def process(tmp_path: Path, code: str, name: str = "child") -> ManagedProcess:
    argv = [sys.executable, "-c", textwrap.dedent(code)]
    return ManagedProcess(name, argv, dict(os.environ), tmp_path / f"{name}.log")


SLEEP = "import time; print('up', flush=True); time.sleep(600)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"
WITH_CHILD = """
    import subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(child.pid, flush=True)
    time.sleep(600)
"""


class Three(Supervisor):
    """`first` serves, `second` and `third` are given by the test."""

    def __init__(self, run_dir: Path, second: str = SLEEP, third: str = SLEEP):
        super().__init__(run_dir)
        self._codes = {"first": SLEEP, "second": second, "third": third}

    def _start(self) -> None:
        for name, code in self._codes.items():
            argv = [sys.executable, "-c", textwrap.dedent(code)]
            ready = lambda name=name: "up" in self.processes[name].tail()  # noqa: E731
            self._launch(name, argv, dict(os.environ), ready)
        self._await_ready(list(self._codes), timeout_s=PATIENCE_S)


def test_a_process_is_stopped_with_the_signal_it_was_given(tmp_path):
    code = """
        import signal, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, lambda *_: (print("interrupted", flush=True), sys.exit(0)))
        print("up", flush=True)
        time.sleep(600)
    """
    argv = [sys.executable, "-c", textwrap.dedent(code)]
    child = ManagedProcess("child", argv, dict(os.environ), tmp_path / "child.log", signal.SIGINT)
    child.start()
    until(lambda: child.tail() == "up")
    stop_all([child], grace_s=PATIENCE_S)
    assert "interrupted" in child.log_path.read_text()


def test_stopping_ends_the_children_of_a_child_too(tmp_path):
    parent = process(tmp_path, WITH_CHILD)
    parent.start()
    until(lambda: parent.log_path.read_text().endswith("\n"))
    grandchild = psutil.Process(int(parent.log_path.read_text()))
    stop_all([parent], grace_s=0.0)
    until(lambda: not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE)


def test_a_child_that_ignores_sigterm_is_killed_after_its_grace(tmp_path):
    stubborn = process(tmp_path, STUBBORN)
    stubborn.start()
    until(lambda: "up" in stubborn.tail())
    pid = stubborn.pid
    stop_all([stubborn], grace_s=0.2)
    assert not psutil.pid_exists(pid)


def test_stopping_leaves_strangers_alone(tmp_path):
    stranger = subprocess.Popen([sys.executable, "-c", SLEEP])
    try:
        with Three(tmp_path):
            pass
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_an_ended_child_keeps_its_number_until_it_is_stopped(tmp_path):
    child = process(tmp_path, "")
    child.start()
    until(lambda: not child.running)
    assert psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE
    pid = child.pid
    stop_all([child], grace_s=0.0)
    assert not psutil.pid_exists(pid)


def test_children_die_with_a_supervisor_that_is_killed(tmp_path):
    code = f"""
        import sys, time
        sys.path[:0] = {sys.path!r}
        from {__name__} import Three
        from pathlib import Path
        three = Three(Path({str(tmp_path)!r}))
        three.start()
        print(*[p.pid for p in three.processes.values()], flush=True)
        time.sleep(600)
    """
    supervisor = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    children = [psutil.Process(int(pid)) for pid in supervisor.stdout.readline().split()]
    assert len(children) == 3
    supervisor.kill()
    supervisor.wait()
    until(
        lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    )


def test_every_child_of_a_process_with_live_grpc_threads_gets_to_its_program(tmp_path):
    server = grpc.server(ThreadPoolExecutor(max_workers=2))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            grpc.channel_ready_future(channel).result(timeout=PATIENCE_S)
            children = [
                ManagedProcess(f"child{i}", ["echo", "up"], dict(os.environ), tmp_path / f"child{i}.log")
                for i in range(50)
            ]
            for child in children:
                child.start()
            until(lambda: not any(child.running for child in children))
            assert {child.describe_exit() for child in children} == {"ended with status 0"}
            assert {child.tail() for child in children} == {"up"}
            stop_all(children, grace_s=0.0)
    finally:
        server.stop(grace=None)


def test_a_program_that_does_not_exist_is_named(tmp_path):
    child = ManagedProcess("child", ["no-such-program"], dict(os.environ), tmp_path / "child.log")
    child.start()
    until(lambda: not child.running)
    assert child.describe_exit() == "ended with status 127" and "no-such-program: not found" in child.tail()
    stop_all([child], grace_s=0.0)


def test_a_process_that_dies_at_the_start_is_named_with_its_last_lines_and_all_others_stop(tmp_path):
    three = Three(tmp_path, third="import sys; print('the disk is full'); sys.exit(3)")
    pids = []
    with pytest.raises(ProcessDied) as caught:
        three.start(lambda text: pids.extend(p.pid for p in three.processes.values() if p.pid))
    assert caught.value.name == "third"
    assert "third ended with status 3" in str(caught.value) and "the disk is full" in str(caught.value)
    assert pids and not any(psutil.pid_exists(pid) for pid in pids)


def test_a_process_that_never_gets_ready_is_named_and_everything_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PATIENCE_S", 1.0)
    three = Three(tmp_path, second="import time; print('loading', flush=True); time.sleep(600)")
    with pytest.raises(StartTimeout, match=r"(?s)second not ready.*loading"):
        three.start()
    assert three.processes == {}


def test_a_process_that_dies_later_is_noticed_and_named(tmp_path):
    with Three(tmp_path) as three:
        three.check()
        os.kill(three.processes["second"].pid, signal.SIGKILL)
        with pytest.raises(ProcessDied, match="second was killed by SIGKILL"):
            three.wait()


def test_a_process_killed_on_purpose_is_no_failure_and_can_come_back(tmp_path):
    with Three(tmp_path) as three:
        first_pid = three.processes["second"].pid
        three.kill("second")
        three.check()
        three.restart("second")
        assert three.processes["second"].pid != first_pid
        os.kill(three.processes["second"].pid, signal.SIGKILL)
        with pytest.raises(ProcessDied, match="second"):
            three.wait()


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path):
    with (
        Three(tmp_path) as three,
        pytest.raises(KeyError, match="no process 'fourth'; there are first, second, third"),
    ):
        three.kill("fourth")


def test_stopping_twice_is_harmless(tmp_path):
    three = Three(tmp_path)
    three.start()
    three.stop()
    three.stop()
