"""A store that hangs for longer than a prefill engine waits for its decode engine costs time only."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import suppress

from dualpath_sgl.evals.agents.sessions import flush, forget_caches, play_all, post
from dualpath_sgl.launch.processes.commands import BOOTSTRAP_TIMEOUT

MARGIN_S = 5.0
LOADING_S = 2.0
"""After so long every load of a few requests hangs in the store."""


def test_a_store_that_hangs_beyond_the_bootstrap_time_out_costs_time_and_no_request(
    cluster, sessions, reference
):
    cluster.set_policy("decode")
    play_all(cluster.url, sessions, 0)
    forget_caches(cluster)
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            play_all(cluster.url, sessions, 0)
        except OSError as error:
            failures.append(error)

    cluster.kill("store", signal.SIGSTOP)
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    time.sleep(float(cluster.config.prefill.env[BOOTSTRAP_TIMEOUT]) + MARGIN_S)
    cluster.kill("store", signal.SIGCONT)
    asking.join()
    assert not failures
    assert {session.name: session.answers[0] for session in sessions} == {
        name: answers[0] for name, answers in reference.items()
    }


def test_a_flush_right_after_an_abort_waits_for_loads_that_hang(cluster, sessions, reference):
    """As RL frameworks do at every step: abort all, then flush or update the weights."""
    cluster.set_policy("split")
    play_all(cluster.url, sessions, 0)
    forget_caches(cluster)

    def ask() -> None:
        with suppress(OSError, KeyError):  # aborted
            play_all(cluster.url, sessions, 0)

    cluster.kill("store", signal.SIGSTOP)
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    time.sleep(LOADING_S)
    for engine in cluster.engines:
        post(f"{engine.url}/abort_request", {"rid": "", "abort_all": True})
    asking.join()
    flushing = [threading.Thread(target=flush, args=(engine.url,)) for engine in cluster.engines]
    for thread in flushing:
        thread.start()
    time.sleep(LOADING_S)
    cluster.kill("store", signal.SIGCONT)
    for thread in flushing:
        thread.join()

    # Whatever the late reads wrote, it went into nobody's pages.
    for _ in range(2):
        play_all(cluster.url, sessions, 0)
        assert {session.name: session.answers[0] for session in sessions} == {
            name: answers[0] for name, answers in reference.items()
        }
        forget_caches(cluster)
