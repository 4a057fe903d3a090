"""A planned request on SGLang's real tree, both sides: its pages come where they belong."""

from __future__ import annotations

import pytest
from tree_story import Peer, prompt

from scheduler_svc.wire.protocol import Outcome


@pytest.mark.parametrize("core", ["python", "rust"])
def test_a_prefill_engine_takes_a_planned_prompt_from_the_decode_engine(engine, core):
    engine = engine("prefill", core=core)
    peer, tokens = Peer(engine), prompt()
    engine.store_holds(tokens)
    req = engine.arrives(tokens)
    engine.until(lambda: engine.reports(req), "report")
    peer.has(req, tokens)
    engine.planned(req, peer, pages=8)
    engine.until(lambda: engine.admitted(req), "loaded")
    assert engine.in_tree(tokens) == [True] * 8
    assert engine.store.reads == [] and engine.dones(req)[0].outcome is Outcome.OK
    engine.finishes(req)
    engine.becomes_idle()
    assert peer.server.offered_rooms == 0


@pytest.mark.parametrize("core", ["python", "rust"])
def test_a_decode_engine_reads_its_share_and_serves_it(engine, core):
    engine = engine("decode", core=core)
    peer, tokens = Peer(engine), prompt()
    engine.store_holds(tokens)
    req = engine.arrives(tokens)
    engine.planned(req, peer, pages=8)
    load = peer.pulls(req.bootstrap_room, 8)
    engine.until(lambda: engine.admitted(req) and not load.lanes_open, "read and served")
    assert load.prefix == 8 and peer.wrong(load, tokens) == 0
    assert engine.in_tree(tokens) == [True] * 8
    engine.becomes_idle()
