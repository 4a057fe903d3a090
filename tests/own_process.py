"""Tests that each get a process of their own (fixture `own_process`), in milliseconds instead of imports.

DualPath is one runtime per process, SGLang has global server arguments, and hooks are applied once: what one
such test changes must not meet the next.  After collection, when every module is imported and no thread of
ours runs, pytest forks a process that only waits.  For each such test that process forks a child, which runs
it with its fixtures, sends pytest's own reports back and ends with all its threads.

A second process waits for tests that want none of the warm-ups (fixture `own_fresh_process`): those put hooks of
the decode-side mode into SGLang.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import tempfile
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Pipe
from typing import IO, NoReturn

import pytest
from _pytest.runner import runtestprotocol

FIXTURE, FRESH_FIXTURE = "own_process", "own_fresh_process"
WARM_UPS: list[Callable[[], object]] = []
"""Called once by the process that waits, before it forks: what takes long and is inherited.  No threads."""
LIMIT_S = 120.0
"""A test that runs longer hangs: its threads' stacks are its report."""


class ForkingProcess:
    """A process that waits; used by pytest's main thread only."""

    def __init__(self, session: pytest.Session, warm_ups: Sequence[Callable[[], object]]) -> None:
        started = [thread.name for thread in threading.enumerate()[1:]]
        assert not started, f"a module of the tests starts threads when it is imported: {started}"
        self._ours, theirs = Pipe()
        if os.fork() == 0:
            self._ours.close()
            _serve(session, warm_ups, theirs)
        theirs.close()

    def run(self, number: int, item: pytest.Item) -> list[pytest.TestReport]:
        """The reports of `item`, which is `session.items[number]`."""
        self._ours.send(number)
        status, reports, stacks = self._ours.recv()
        if status == 0:
            hook = item.config.hook
            return [
                hook.pytest_report_from_serializable(config=item.config, data=data)
                for data in pickle.loads(reports)
            ]
        why = f"its process ended with {_in_words(status)}\n{stacks}"
        keywords = dict.fromkeys(item.keywords, 1)
        return [pytest.TestReport(item.nodeid, item.location, keywords, "failed", why, "call")]


def _in_words(status: int) -> str:
    return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {os.WEXITSTATUS(status)}"


def _serve(
    session: pytest.Session, warm_ups: Sequence[Callable[[], object]], requests: Connection
) -> NoReturn:
    """Fork a child for every test that is asked for, until pytest has ended."""
    for warm_up in warm_ups:
        warm_up()
    while True:
        try:
            number = requests.recv()
        except EOFError:
            os._exit(0)
        with tempfile.TemporaryFile() as reports, tempfile.TemporaryFile() as stacks:
            child = os.fork()
            if child == 0:
                faulthandler.enable(stacks)
                faulthandler.dump_traceback_later(LIMIT_S, exit=True, file=stacks)
                _run(session, number, reports)
            _, status = os.waitpid(child, 0)
            reports.seek(0)
            stacks.seek(0)
            requests.send((status, reports.read(), stacks.read().decode(errors="replace")))


def _run(session: pytest.Session, number: int, reports: IO[bytes]) -> NoReturn:
    # Output goes to files of this process: the ones it came with are shared with pytest's.
    capture = session.config.pluginmanager.getplugin("capturemanager")
    capture.stop_global_capturing()
    capture.start_global_capturing()
    hook = session.config.hook
    made = runtestprotocol(session.items[number], log=False)
    data = [hook.pytest_report_to_serializable(config=session.config, report=report) for report in made]
    pickle.dump(data, reports)
    reports.flush()
    os._exit(0)  # daemon threads and native libraries are not waited for


class Plugin:
    """Sends each test that asks for one of the fixtures to its forking process."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._processes: dict[str, ForkingProcess] = {}
        """By the test that is sent to it."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> None:
        for fixture, warm_ups in ((FRESH_FIXTURE, ()), (FIXTURE, WARM_UPS)):
            numbers = {
                item.nodeid: number
                for number, item in enumerate(session.items)
                if fixture in getattr(item, "fixturenames", ())
            }
            if numbers and not session.config.option.collectonly:
                self._numbers |= numbers
                self._processes |= dict.fromkeys(numbers, ForkingProcess(session, warm_ups))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        if item.nodeid not in self._numbers:
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._processes[item.nodeid].run(self._numbers[item.nodeid], item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        # What earlier tests of this process set up and the next one does not need.
        item.session._setupstate.teardown_exact(nextitem)
        return True
