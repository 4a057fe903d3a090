"""Flush, detach and attach while DualPath's lanes still read: they wait, and nothing is handed out twice."""

from __future__ import annotations

import threading

import pytest
import torch
from tree_story import Peer, prompt

from scheduler_svc.wire.protocol import Outcome

GOES_ON_S = 0.5
"""How long the store takes for the read that is in the way."""
FOREIGN = -1.0
"""What Engine.take_host_pages writes."""


def begin_reading(engine, tokens):
    """A request of which pages are being read, by whichever lane its role has; it has been aborted."""
    engine.store_holds(tokens)
    read = engine.store.pause()
    if engine.sglang.role == "prefill" and engine.channel is not None:
        engine.channel.connected = False  # the prefill path at once
    req = engine.arrives(tokens)
    if engine.sglang.role == "decode":
        engine.planned(req, None, pages=8)
    engine.until(read.began.is_set, "the read began")
    engine.aborts(req)
    engine.step()
    return read


def pages_that_stay_ones_own(engine, read) -> int:
    """All pages that can be had now; none of them is written by `read`, nor handed out twice."""
    slots = engine.take_host_pages(8)
    read.over.set()
    engine.until(lambda: engine.store.ended_reads == len(engine.store.reads), "the read is over")
    engine.goes_on(0.2)
    pages = engine.page_numbers(slots)
    assert torch.all(engine.pool.kv_buffer[:, pages] == FOREIGN), "the old read wrote into new pages"
    others = engine.page_numbers(engine.take_host_pages())
    assert len({*others, *pages}) == len(others) + len(pages), "pages were handed out twice"
    return len(others) + len(pages)


@pytest.mark.case("flush_while_aborted_load_reads")
@pytest.mark.parametrize("side", ["prefill", "decode", "upstream"])
@pytest.mark.parametrize("core", ["python", "rust"])
def test_a_flush_waits_for_the_read_of_an_aborted_request(engine, side, core):
    engine = engine("decode" if side == "decode" else "prefill", dualpath=side != "upstream", core=core)
    read = begin_reading(engine, prompt())
    threading.Timer(GOES_ON_S, read.over.set).start()
    assert engine.flush()
    assert pages_that_stay_ones_own(engine, read) == engine.pool.logical_size // engine.page_tokens


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_an_aborted_load_is_held_until_its_lane_has_let_go(engine, role):
    engine = engine(role)
    read = begin_reading(engine, prompt())
    engine.goes_on(0.1)
    assert engine.held > 0
    read.over.set()
    engine.becomes_idle()


@pytest.mark.parametrize("side", ["prefill", "decode", "upstream"])
def test_a_detach_waits_for_the_read_of_an_aborted_request(engine, side):
    engine = engine("decode" if side == "decode" else "prefill", dualpath=side != "upstream")
    read = begin_reading(engine, prompt())
    threading.Timer(GOES_ON_S, read.over.set).start()
    engine.until(engine.sglang.scheduler.is_fully_idle, "SGLang counts as idle")
    detached, why = engine.detach()
    assert detached, why
    # Fewer than all: SGLang itself forgets an aborted read's pages at a detach, until the next flush.
    assert pages_that_stay_ones_own(engine, read)
    assert engine.flush()
    assert engine.pool.available_size() == engine.pool.logical_size


def assert_serves(engine) -> None:
    """A planned request comes right."""
    peer, tokens = Peer(engine), prompt()
    engine.store_holds(tokens)
    req = engine.arrives(tokens)
    if engine.sglang.role == "prefill":
        engine.until(lambda: engine.reports(req), "report")
        peer.has(req, tokens)
    engine.planned(req, peer, pages=8)
    if engine.sglang.role == "decode":
        load = peer.pulls(req.bootstrap_room, 8)
        engine.until(lambda: not load.lanes_open, "the pull ended")
        assert load.prefix == 8 and peer.wrong(load, tokens) == 0
    engine.until(lambda: engine.admitted(req), "admitted")
    assert engine.in_tree(tokens) == [True] * 8
    assert [done.outcome for done in engine.dones(req)] == [Outcome.OK]
    engine.finishes(req)
    engine.becomes_idle()


@pytest.mark.case("reattach_backend")
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_detached_backend_is_attached_again_and_serves(engine, role):
    engine = engine(role)
    assert_serves(engine)
    for _ in range(2):
        detached, why = engine.detach()
        assert detached, why
        attached, why = engine.attach()
        assert attached, why
        assert_serves(engine)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_an_engine_serves_after_every_flush(engine, role):
    engine = engine(role)
    for _ in range(3):
        assert_serves(engine)
        assert engine.flush()
        assert engine.held == 0


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_detached_engine_holds_no_request_back(engine, role):
    engine = engine(role, settings={"plan_timeout_s": 0.3})
    assert engine.detach()[0]
    tokens = prompt()
    req = engine.arrives(tokens)
    engine.until(lambda: engine.admitted(req), "admitted")
    engine.finishes(req)
    engine.until(lambda: engine.held == 0, "nothing is held")
