"""A test with a process of its own leaves nothing behind."""

import os
import threading

import pytest

MARK = "DUALPATH_TEST_OWN_PROCESS"
PYTEST = os.getpid()


@pytest.mark.parametrize("time", ["first", "second"])
def test_each_begins_as_pytest_began(own_process, time):
    assert os.getpid() != PYTEST and MARK not in os.environ and threading.active_count() == 1
    os.environ[MARK] = time
    threading.Thread(target=threading.Event().wait, daemon=True).start()


def test_others_run_where_pytest_runs():
    assert os.getpid() == PYTEST and MARK not in os.environ
