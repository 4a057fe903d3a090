"""SGLang takes a prefetch's pages when its policy says so, not when DualPath would: the room closes first."""

from __future__ import annotations

import threading

import pytest
from tree_story import Peer, prompt

from dualpath_sgl.lanes import store_lane
from dualpath_sgl.lanes.forward import Forwarder

PAGES = 8
HALF = PAGES // 2
DEADLINE_S = 0.15
LONG_S = 600.0
"""A lease or time-out that a test does not live to see."""


class BusyForwarder(Forwarder):
    """The lane has another read to do until `free` is set."""

    free = threading.Event()

    def read(self, *args, **kwargs):
        self.free.wait()
        return super().read(*args, **kwargs)


def read_in_halves(engine, monkeypatch) -> None:
    for name in ("LEAST_BATCH_BYTES", "MOST_BATCH_BYTES"):
        monkeypatch.setattr(store_lane, name, HALF * engine.runtime.page_bytes)


def impatient(engine, role: str, policy: str, **options):
    return engine(role, policy=policy, extra_config={"prefetch_timeout_base": DEADLINE_S}, **options)


@pytest.mark.case("decode_prefetch_policy_timeout")
@pytest.mark.parametrize("policy", ["timeout", "wait_complete", "best_effort"])
@pytest.mark.parametrize("core", ["python", "rust"])
def test_no_page_counts_for_the_prefill_engine_after_sglang_took_it(engine, policy, core, monkeypatch):
    engine = impatient(engine, "decode", policy, core=core)
    read_in_halves(engine, monkeypatch)
    peer, tokens = Peer(engine, forwarder=BusyForwarder), prompt(PAGES)
    engine.store_holds(tokens)
    second_half = engine.store.pause(nth=2)
    req = engine.arrives(tokens)
    engine.planned(req, peer, PAGES)
    load = peer.pulls(req.bootstrap_room, PAGES)
    # The prefill engine knows of the first half, and is busy; the deadline passes.
    taken = engine.within(6 * DEADLINE_S, lambda: engine.admitted(req))
    assert taken or policy == "wait_complete"
    if taken:
        engine.evict_host()
        engine.take_host_pages()
    else:
        second_half.over.set()
    BusyForwarder.free.set()
    engine.until(lambda: not load.lanes_open, "the pull ended")
    assert peer.wrong(load, tokens) == 0
    assert load.prefix == (0 if taken else PAGES)
    second_half.over.set()
    engine.until(lambda: engine.held == 0, "nothing is held")


@pytest.mark.parametrize("policy", ["timeout", "best_effort"])
def test_pages_that_were_whole_at_the_deadline_stay_in_the_tree(engine, policy, monkeypatch):
    engine = impatient(engine, "decode", policy, settings={"subscribe_timeout_s": 0.5})
    read_in_halves(engine, monkeypatch)
    tokens = prompt(PAGES)
    engine.store_holds(tokens)
    second_half = engine.store.pause(nth=2)
    req = engine.arrives(tokens)
    engine.planned(req, None, PAGES)
    engine.until(lambda: engine.admitted(req), "admitted")
    assert all(engine.in_tree(tokens)) and len(engine.in_tree(tokens)) <= HALF
    second_half.over.set()
    engine.becomes_idle()


@pytest.mark.parametrize("policy", ["timeout", "best_effort"])
def test_a_prefill_engine_computes_what_the_deadline_cut_off(engine, policy):
    engine = impatient(engine, "prefill", policy)
    peer, tokens = Peer(engine, lease_s=LONG_S, subscribe_timeout_s=LONG_S), prompt(PAGES)
    engine.store_holds(tokens)
    req = engine.arrives(tokens)
    engine.until(lambda: engine.reports(req), "report")
    peer.opens(req)
    engine.planned(req, peer, PAGES)
    peer.publishes(req, tokens, 0, HALF)
    engine.until(lambda: engine.admitted(req), "admitted, though the decode engine still reads")
    assert all(engine.in_tree(tokens))
    engine.until(lambda: peer.server.offered_rooms == 0, "the decode engine was let go")
    engine.finishes(req)
    engine.becomes_idle()


@pytest.mark.case("decode_read_revoked")
@pytest.mark.parametrize("why", ["pool full", "best_effort"])
def test_a_revoked_read_ends_its_room_at_once(engine, why):
    policy = "best_effort" if why == "best_effort" else "wait_complete"
    engine = engine("decode", policy=policy, settings={"lease_s": LONG_S, "subscribe_timeout_s": LONG_S})
    peer, tokens = Peer(engine, peer_timeout_s=LONG_S), prompt(PAGES)
    engine.store_holds(tokens)
    if why == "pool full":
        engine.take_host_pages()
    read = engine.store.pause()
    req = engine.arrives(tokens)
    engine.planned(req, peer, PAGES)
    load = peer.pulls(req.bootstrap_room, PAGES)
    engine.until(lambda: not load.lanes_open, "the prefill engine went on")
    assert [missing[:2] for missing in peer.missing] == [(0, PAGES)]
    engine.until(lambda: engine.admitted(req), "admitted")
    (done,) = engine.dones(req)
    assert done.outcome.value == "fallback" and done.loaded_pages == 0
    assert done.fallback_reason == peer.missing[0][2], "both engines give the same reason"
    read.over.set()
    engine.until(lambda: engine.held == 0, "nothing is held")


@pytest.mark.case("prefill_host_pool_full")
def test_a_prefill_engine_without_host_memory_lets_the_decode_engine_go(engine):
    engine = engine("prefill")
    peer, tokens = Peer(engine, lease_s=LONG_S, subscribe_timeout_s=LONG_S), prompt(PAGES)
    engine.store_holds(tokens)
    engine.take_host_pages()
    req = engine.arrives(tokens)
    engine.until(lambda: engine.reports(req), "report")
    peer.opens(req)
    engine.planned(req, peer, PAGES)
    engine.until(lambda: peer.server.offered_rooms == 0, "the decode engine was let go")
    engine.until(lambda: engine.admitted(req), "admitted")
    (done,) = engine.dones(req)
    assert done.fallback_reason == "no host memory" and done.loaded_pages == 0
    engine.finishes(req)
    engine.until(lambda: engine.held == 0, "nothing is held")


@pytest.mark.case("side_pool_model_waits")
@pytest.mark.parametrize("planned", [False, True])
def test_a_model_with_a_side_pool_takes_the_prefill_path_at_once(engine, planned):
    engine = engine("prefill", side_pool=True, settings={"plan_timeout_s": LONG_S})
    peer, tokens = Peer(engine, lease_s=LONG_S, subscribe_timeout_s=LONG_S), prompt(PAGES)
    engine.store_holds(tokens)
    req = engine.arrives(tokens)
    engine.until(lambda: engine.reports(req), "report")
    (report,) = engine.reports(req)
    assert report.hit_pages == report.local_pages, "such a report leads to no read by the decode engine"
    if planned:  # all the same
        peer.opens(req)
        engine.planned(req, peer, PAGES)
    engine.until(lambda: engine.admitted(req), "loaded from the store")
    engine.until(lambda: peer.server.offered_rooms == 0, "the decode engine was let go")
    assert engine.in_tree(tokens) == [True] * PAGES
    engine.finishes(req)
    engine.becomes_idle()
