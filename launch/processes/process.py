"""One child process of a cluster: own process group, own log, never left behind.

* It dies with the supervisor, even one killed by SIGKILL (a parent-death signal, prctl(2)).
* No code of this process runs in the child before exec: with gRPC's threads about (span export),
  a plain fork would run its fork handlers there, and they can end the child.
* Its process id stays reserved until its whole group is gone: it is watched without being
  reaped, so a signal to the group can never reach a stranger that got the same number.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

POLL_S = 0.05
TAIL_LINES = 25

# `setpriv` asks for the parent-death signal; the shell then ends if the supervisor (`$0`) died before.
_DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL", "sh", "-c", '[ "$PPID" = "$0" ] || exit 1; exec "$@"')
# The parent-death signal is sent when the *thread* that started the child ends, so one
# thread that lives as long as this process starts them all.
_starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="starter")


class ProcessDied(RuntimeError):
    """A process ended that should be running; the message holds its last log lines."""

    def __init__(self, process: ManagedProcess):
        super().__init__(
            f"{process.name} {process.describe_exit()}; its last lines ({process.log_path}):\n"
            f"{process.tail()}"
        )
        self.name = process.name


class ManagedProcess:
    """`name` is unique in its cluster; `env` is the complete environment."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        log_path: Path,
        stop_signal: signal.Signals = signal.SIGTERM,
    ):
        self.name = name
        self.stop_signal = stop_signal
        self.argv = list(argv)
        self.env = dict(env)
        self.log_path = log_path
        self.pid: int | None = None
        self._popen: subprocess.Popen | None = None

    def start(self) -> None:
        if self._popen is not None:
            raise RuntimeError(f"{self.name} is running already")
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self._popen = _starter.submit(self._spawn, os.getpid()).result()
        self.pid = self._popen.pid

    def _spawn(self, supervisor_pid: int) -> subprocess.Popen:
        with self.log_path.open("ab") as log:
            return subprocess.Popen(
                [*_DIE_WITH_PARENT, str(supervisor_pid), *self.argv],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Not a session of its own: Linux shares cores among sessions (autogroups) first, and
                # a thread's niceness (`dualpath_sgl/threads/priority.py`) counts only within one.
                process_group=0,
            )

    @property
    def running(self) -> bool:
        return self._popen is not None and self._exit_status() is None

    def send(self, signal_number: int) -> None:
        """To the process itself, not to its children."""
        os.kill(self._require_pid(), signal_number)

    def send_group(self, signal_number: int) -> None:
        """To the process and all its children."""
        os.killpg(self._require_pid(), signal_number)

    def terminate(self) -> None:
        if self.running:
            self.send(self.stop_signal)

    def finish(self, deadline_s: float) -> None:
        """Wait for it until `deadline_s` (time.monotonic), then kill what is left of its group."""
        if self._popen is None:
            return
        while self.running and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
        self.send_group(signal.SIGKILL)  # The unreaped leader keeps the group's number valid.
        self._popen.wait()
        self._popen = None
        self.pid = None

    def tail(self, lines: int = TAIL_LINES) -> str:
        if not self.log_path.exists():
            return "(no output)"
        text = self.log_path.read_text(errors="replace").splitlines()
        return "\n".join(text[-lines:]) or "(no output)"

    def describe_exit(self) -> str:
        status = self._exit_status()
        if status is None:
            return "is running"
        code, value = status
        if code == os.CLD_EXITED:
            return f"ended with status {value}"
        return f"was killed by {signal.Signals(value).name}"

    def _exit_status(self) -> tuple[int, int] | None:
        """(si_code, si_status) once it has ended; does not reap it."""
        ended = os.waitid(os.P_PID, self._require_pid(), os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return None if ended is None else (ended.si_code, ended.si_status)

    def _require_pid(self) -> int:
        if self.pid is None:
            raise RuntimeError(f"{self.name} is not running")
        return self.pid


def stop_all(processes: Sequence[ManagedProcess], grace_s: float) -> None:
    """The stop signal to all at once, then SIGKILL to the groups of those still there after `grace_s`."""
    for process in processes:
        process.terminate()
    deadline_s = time.monotonic() + grace_s
    for process in processes:
        process.finish(deadline_s)
