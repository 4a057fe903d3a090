"""An exception in one of DualPath's threads costs that load its second path, never the next one anything."""

from __future__ import annotations

import pytest
from data_path_world import eventually
from tree_story import Peer, prompt

from dualpath_sgl.lanes.peer_lane import PeerLane
from scheduler_svc.wire.protocol import Outcome

PAGES = 8


def arrive_planned(engine, tokens, endpoint_of: Peer, before_memory: bool):
    engine.store_holds(tokens)
    req = engine.arrives(tokens)
    # One of SGLang's own threads reports; its loop, which stands still, would give the load memory.
    eventually(lambda: engine.reports(req), "report")
    if not before_memory:
        engine.goes_on(0.3)
    engine.planned(req, endpoint_of, PAGES)
    return req


@pytest.mark.case("lane_thread_fails_to_start")
@pytest.mark.parametrize("thread", ["control", "io"])
def test_a_lane_that_cannot_start_costs_one_load_its_second_path(engine, thread, monkeypatch):
    engine = engine("prefill")
    peer = Peer(engine)

    def cannot_start(self) -> None:
        raise RuntimeError("can't start new thread")

    tokens = prompt(PAGES)
    with monkeypatch.context() as broken:
        broken.setattr(PeerLane, "start", cannot_start)
        failed = arrive_planned(engine, tokens, peer, before_memory=thread == "io")
        engine.until(lambda: engine.admitted(failed), "the load ended")
    assert engine.in_tree(tokens) == [True] * PAGES
    engine.until(lambda: engine.dones(failed), "it was reported")
    assert engine.dones(failed)[0].outcome is Outcome.FALLBACK
    assert engine.dones(failed)[0].fallback_reason == "peer lane did not start"

    tokens = prompt(PAGES)
    engine.store_holds(tokens)
    following = engine.arrives(tokens)
    engine.until(lambda: engine.reports(following), "report")
    peer.has(following, tokens)
    engine.planned(following, peer, PAGES)
    engine.until(lambda: engine.admitted(following), "the next load ended")
    assert engine.in_tree(tokens) == [True] * PAGES
    assert engine.dones(following)[0].outcome is Outcome.OK
    for req in (failed, following):
        engine.finishes(req)
    engine.until(lambda: engine.held == 0, "nothing is held")
