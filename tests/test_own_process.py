"""A test with a process of its own leaves nothing behind."""

import os
import threading

import own_process
import pytest

MARK = "DUALPATH_TEST_OWN_PROCESS"
WARMED = "DUALPATH_TEST_WARMED"
PYTEST = os.getpid()
own_process.WARM_UPS.append(lambda: os.environ.update({WARMED: "1"}))


@pytest.mark.parametrize("time", ["first", "second"])
def test_each_begins_as_pytest_began(own_process, time):
    assert os.getpid() != PYTEST and MARK not in os.environ and threading.active_count() == 1
    os.environ[MARK] = time
    threading.Thread(target=threading.Event().wait, daemon=True).start()


def test_one_that_wants_no_warm_ups_has_none(own_fresh_process):
    assert os.getpid() != PYTEST and WARMED not in os.environ


def test_the_others_have_them(own_process):
    assert WARMED in os.environ


def test_others_run_where_pytest_runs():
    assert os.getpid() == PYTEST and MARK not in os.environ
