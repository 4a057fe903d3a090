"""A store that hangs for longer than a prefill engine waits for its decode engine costs time only."""

from __future__ import annotations

import signal
import threading
import time

from agents import forget_caches, play_all

from launch.commands import BOOTSTRAP_TIMEOUT

MARGIN_S = 5.0


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
