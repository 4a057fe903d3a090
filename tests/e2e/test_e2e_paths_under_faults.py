"""A fault costs time, never a request, unless the engine that owns the request died."""

from __future__ import annotations

import signal
import threading
import time
import urllib.error
from functools import partial

from scrapes import total, wait_for

from dualpath_sgl.evals.agents.sessions import TURNS, forget_caches, play_all, reads, wait_until_served

REQUEST_ANSWERED_WITHIN_S = 60.0
"""After the death of its decode engine; not a target, only the difference from a hang."""


def test_a_scheduler_killed_mid_run_costs_no_request_and_plans_again_after_its_return(
    cluster, sessions, reference
):
    cluster.set_policy("decode")
    play_all(cluster.url, sessions, 0)
    forget_caches(cluster)
    ports = [f"{engine.url}/metrics" for engine in cluster.engines]
    left_their_plan = partial(total, ports, "dualpath_rank_requests_total", outcome="fallback")
    before = left_their_plan()
    asking = threading.Thread(target=play_all, args=(cluster.url, sessions, 0))
    asking.start()
    cluster.kill("scheduler")
    asking.join()
    for turn in range(1, TURNS):
        forget_caches(cluster)
        play_all(cluster.url, sessions, turn)
    assert {session.name: session.answers for session in sessions} == reference
    # Each later turn had stored pages, and no plan: the engines say so, while the scheduler cannot.
    assert left_their_plan() >= before + len(sessions) * (TURNS - 1)
    wait_for(partial(total, ports, "dualpath_rank_scheduler_connected"), 0)

    cluster.set_policy("decode")
    wait_for(partial(total, ports, "dualpath_rank_scheduler_connected"), len(ports))
    forget_caches(cluster)
    play_all(cluster.url, sessions, TURNS - 1)
    counted = reads(cluster)
    assert {session.name: session.answers for session in sessions} == reference
    assert counted.decode_store_bytes > 0
    assert counted.fallbacks == 0


def test_a_decode_engine_that_hangs_and_dies_mid_forward_fails_only_its_own_request(
    cluster, sessions, reference
):
    cluster.set_policy("decode")
    play_all(cluster.url, sessions, 0)
    forget_caches(cluster)
    failure: list[BaseException] = []

    def ask() -> None:
        try:
            sessions[0].play(cluster.url, 0)
        except OSError as error:
            failure.append(error)

    # Hung from before the request: the PE has a plan that names a DE which never delivers.
    cluster.kill("decode-0", signal.SIGSTOP)
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    time.sleep(1.0)
    cluster.kill("decode-0")
    asking.join(REQUEST_ANSWERED_WITHIN_S)
    assert not asking.is_alive(), "the client hangs after its decode engine died"
    assert isinstance(failure[0], urllib.error.HTTPError), f"no clear HTTP error: {failure[0]!r}"
    assert failure[0].code >= 500

    cluster.restart("decode-0")
    cluster.set_policy("decode")
    wait_until_served(cluster)
    for turn in range(TURNS):
        forget_caches(cluster)
        play_all(cluster.url, sessions, turn)
    assert {session.name: session.answers for session in sessions} == reference
    assert reads(cluster).decode_store_bytes > 0
