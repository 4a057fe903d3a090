"""Processes that start together and stop together: start, watch, disturb, stop.

Everything logs to `run_dir/logs/<name>.log`.

While they are waited for (`wait`), a part without which the others go on is started again when it
dies: a fault costs time, never the whole.  A part that dies while anything starts or is measured is an
error, whichever it is.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import psutil

from dualpath_sgl.launch.processes.process import ManagedProcess, ProcessDied, stop_all
from dualpath_sgl.launch.processes.run_dir import STATE_FILE, Claim, ProcessState
from dualpath_sgl.launch.supervision.comeback import Comeback
from dualpath_sgl.launch.supervision.direct_http import answers

START_TIMEOUT_S = 600.0
STOP_GRACE_S = 10.0
POLL_S = 0.2
PROBE_TIMEOUT_S = 2.0

Event = Callable[[str], None]
Probe = Callable[[], bool]


class StartTimeout(RuntimeError):
    """Processes run, but are not ready; the message names them and their logs."""


class Supervisor:
    """Processes that start together, and stop together however that ends."""

    stop_order: tuple[tuple[str, ...], ...] = ()
    """Names (or their beginnings) in the order of stopping; the rest stops last."""
    spared: Mapping[str, str] = MappingProxyType({})
    """Processes that `wait` starts again when they die -> what holds until they are back."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir.resolve()
        self.processes: dict[str, ManagedProcess] = {}
        self._claim: Claim | None = None
        self._comebacks: dict[str, Comeback] = {}
        self._last_ends: dict[str, str] = {}
        self._probes: dict[str, Probe] = {}
        self._killed: set[str] = set()
        self._silent: set[str] = set()
        """Processes that run, but answer nobody."""
        self._on_event: Event = lambda text: None

    def start(self, on_event: Event | None = None) -> None:
        """Start everything and wait until it serves.  Stops everything again if that fails.

        `on_event` gets one line of text per step.  Raises ProcessDied, StartTimeout, or RunDirError
        when somebody else uses the run directory.
        """
        if self.processes:
            raise RuntimeError("already started")
        self._on_event = on_event or self._on_event
        self._claim = Claim(self.run_dir)
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop what was started here, and nothing else.  Idempotent."""
        if self._claim is None:
            return
        remaining = dict(self.processes)
        for beginnings in (*self.stop_order, ("",)):
            group = [name for name in remaining if name.startswith(beginnings)]
            stop_all([remaining.pop(name) for name in group], STOP_GRACE_S)
        self.processes.clear()
        self._killed.clear()
        self._comebacks.clear()
        (self.run_dir / STATE_FILE).unlink(missing_ok=True)
        self._claim.release()
        self._claim = None

    def __enter__(self):
        if not self.processes:
            self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def check(self) -> None:
        """Raises ProcessDied for the first process that ended and was not killed by `kill`."""
        for name, process in self.processes.items():
            if name not in self._killed and not process.running:
                raise ProcessDied(process)

    def wait(self) -> None:
        """Watch until a process ends that is not spared.  Raises ProcessDied."""
        while True:
            self._look()
            time.sleep(POLL_S)

    def _look(self) -> None:
        for name, process in self.processes.items():
            if name in self._killed or process.running:
                continue
            if name not in self.spared:
                raise ProcessDied(process)
            self._bring_back(process)

    def _bring_back(self, process: ManagedProcess) -> None:
        comeback = self._comebacks.setdefault(process.name, Comeback())
        if comeback.due_s is None:
            delay_s = comeback.died(time.monotonic())
            self._last_ends[process.name] = process.describe_exit()
            self._on_event(self._obituary(process, comeback, delay_s))
        elif time.monotonic() >= comeback.due_s:
            process.finish(deadline_s=0.0)
            process.start()
            comeback.started()
            self._on_event(f"{process.name} started again")
        else:
            return
        self._write_state()

    def _obituary(self, process: ManagedProcess, comeback: Comeback, delay_s: float) -> str:
        text = (
            f"{process.name} {process.describe_exit()}; {self.spared[process.name]}; it is started again in "
            f"{delay_s:g} s (log {process.log_path})"
        )
        if not comeback.alarming:
            return text
        return (
            f"error: {text}; it died {comeback.deaths_in_a_row} times in a row: put right what its last "
            f"lines name\n{process.tail()}"
        )

    def kill(self, name: str, signal_number: int = signal.SIGKILL) -> None:
        """Send a signal to the named process and its children (a fault, not a shutdown)."""
        process = self._process(name)
        if signal_number == signal.SIGKILL:
            self._killed.add(name)
        process.send_group(signal_number)
        while signal_number == signal.SIGKILL and process.running:
            time.sleep(0.01)

    def restart(self, name: str) -> None:
        """Stop the named process if it runs, start it again, and wait until it is ready."""
        process = self._process(name)
        self._killed.add(name)
        stop_all([process], STOP_GRACE_S)
        process.start()
        self._killed.discard(name)
        self._write_state()
        self._await_ready([name])

    def _start(self) -> None:
        raise NotImplementedError

    def _state_of(self, name: str, process: ManagedProcess) -> ProcessState:
        comeback = self._comebacks.get(name, Comeback())
        return ProcessState(
            pid=process.pid,
            started_s=0.0 if process.pid is None else psutil.Process(process.pid).create_time(),
            log=str(process.log_path),
            restarts=comeback.restarts,
            last_end=self._last_ends.get(name, ""),
            silent=name in self._silent,
        )

    def _write_state(self) -> None:
        """Nothing is written for a supervisor without a state file."""

    def _enter(self, name: str, argv: list[str]) -> list[str]:
        """The command that runs `argv` where the named process belongs."""
        return argv

    def _launch(
        self,
        name: str,
        argv: list[str],
        env: dict[str, str],
        ready: Probe,
        stop_signal: signal.Signals = signal.SIGTERM,
    ) -> None:
        log_path = self.run_dir / "logs" / f"{name}.log"
        process = ManagedProcess(name, self._enter(name, argv), env, log_path, stop_signal)
        process.log_path.unlink(missing_ok=True)
        self.processes[name] = process
        self._probes[name] = ready
        process.start()
        self._on_event(f"{name} started (log {process.log_path})")

    def _await_ready(self, names: list[str], timeout_s: float = START_TIMEOUT_S) -> None:
        begun_s = time.monotonic()
        waiting = list(names)
        while waiting:
            self.check()
            for name in list(waiting):
                if self._probes[name]():
                    waiting.remove(name)
                    self._on_event(f"{name} ready after {time.monotonic() - begun_s:.1f} s")
            if waiting and time.monotonic() - begun_s > timeout_s:
                own = [name for name in waiting if name in self.processes]
                logs = "\n".join(f"{name}:\n{self.processes[name].tail()}" for name in own)
                raise StartTimeout(
                    f"{', '.join(waiting)} not ready after {timeout_s:g} s; last lines\n{logs}"
                )
            if waiting:
                time.sleep(POLL_S)

    def _process(self, name: str) -> ManagedProcess:
        if name not in self.processes:
            raise KeyError(f"no process {name!r}; there are {', '.join(self.processes) or 'none'}")
        return self.processes[name]


def healthy(url: str) -> Probe:
    """Whether an SGLang server answers there."""
    return lambda: answers(f"{url}/health", PROBE_TIMEOUT_S)
