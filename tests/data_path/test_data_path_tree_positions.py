"""Which pages an operation holds is what SGLang says, whatever its mode, key and page size."""

from __future__ import annotations

from array import array

import pytest
import torch
from data_path_world import eventually
from sglang.srt.mem_cache.pool_host.dsa import DSAIndexerPoolHost
from sglang.srt.mem_cache.radix_cache import RadixKey
from tree_story import Peer, prompt

from scheduler_svc.wire.protocol import Outcome

PAGES = 8


@pytest.mark.case("host_memory_mode_buffer_only")
def test_pages_that_sglang_trims_from_an_operation_shift_the_others(engine):
    engine = engine("prefill", host_memory="buffer_only")
    peer, tokens = Peer(engine), prompt(PAGES)
    engine.store_holds(tokens)
    req = engine.arrives(tokens)
    # A thread of SGLang's reports.  Before its loop goes on, a request with the same first two pages ends.
    eventually(lambda: engine.reports(req), "report")
    engine.computed(tokens, pages=2)
    peer.has(req, tokens)
    engine.planned(req, peer, PAGES)
    operation = engine.tree.ongoing_prefetch[req.cache_request_handle].operation
    engine.until(lambda: engine.admitted(req), "loaded")
    assert operation.hash_value == engine.hashes(tokens)[2:]
    assert all(engine.holds(operation.host_indices, operation.hash_value))


@pytest.mark.case("host_memory_mode_buffer_only")
def test_a_decode_engine_without_a_host_cache_is_refused(engine):
    with pytest.raises(ValueError, match="buffer_only"):
        engine("decode", host_memory="buffer_only")


@pytest.mark.case("small_pages_restore")
@pytest.mark.parametrize("page_tokens", [1, 4, 8])
@pytest.mark.parametrize("core", ["python", "rust"])
def test_a_small_promise_is_kept(engine, page_tokens, core):
    engine = engine("decode", page_tokens=page_tokens, core=core)
    peer, tokens = Peer(engine), prompt(2, page_tokens)
    engine.store_holds(tokens)
    req = engine.arrives(tokens)
    engine.planned(req, peer, pages=2)
    load = peer.pulls(req.bootstrap_room, 2)
    transfers = engine.sglang.scheduler.disagg_decode_transfer_queue
    engine.until(lambda: req.rid in transfers.ended, "restored")
    entry = transfers.ended[req.rid]
    assert entry.hicache_restore_status.value == "ready"
    engine.until(lambda: not load.lanes_open, "the pull ended")
    assert peer.wrong(load, tokens) == 0
    engine.becomes_idle()


@pytest.mark.case("eagle_tree_reads_short")
@pytest.mark.parametrize("core", ["python", "rust"])
def test_an_eagle_decode_engine_reads_every_planned_page(engine, core):
    engine = engine("decode", eagle=True, core=core)
    peer, tokens = Peer(engine), prompt(PAGES)
    assert len(engine.hashes(tokens)) == PAGES
    engine.store_holds(tokens)
    req = engine.arrives(tokens)
    engine.planned(req, peer, PAGES)
    load = peer.pulls(req.bootstrap_room, PAGES)
    engine.until(lambda: engine.admitted(req) and not load.lanes_open, "read and served")
    (done,) = engine.dones(req)
    assert (done.outcome, done.loaded_pages) == (Outcome.OK, PAGES)
    assert load.prefix == PAGES and peer.wrong(load, tokens) == 0


def test_an_eagle_decode_engine_reads_on_where_its_tree_ends(engine):
    engine = engine("decode", eagle=True)
    peer, tokens = Peer(engine), prompt(PAGES)
    engine.store_holds(tokens)
    engine.computed(tokens, pages=3)
    engine.until(lambda: len(engine.in_tree(tokens)) == 3, "three pages are on the host")
    req = engine.arrives(tokens)
    engine.planned(req, peer, PAGES)
    load = peer.pulls(req.bootstrap_room, PAGES)
    engine.until(lambda: engine.admitted(req) and not load.lanes_open, "read and served")
    assert load.prefix == PAGES and peer.wrong(load, tokens) == 0
    assert engine.in_tree(tokens) == [True] * PAGES


def test_an_eagle_prefill_engine_takes_the_planned_pages(engine):
    engine = engine("prefill", eagle=True)
    peer, tokens = Peer(engine), array("q", [*prompt(PAGES), 7])
    engine.store_holds(tokens)
    req = engine.arrives(tokens)
    engine.until(lambda: engine.reports(req), "report")
    assert engine.reports(req)[0].hit_pages == PAGES
    peer.has(req, tokens)
    engine.planned(req, peer, PAGES)
    engine.until(lambda: engine.admitted(req), "loaded")
    assert engine.store.reads == [] and engine.in_tree(tokens) == [True] * PAGES


@pytest.mark.case("fact_eagle_boundary_token")
@pytest.mark.parametrize("pages", [1, 4, 100])
def test_eagle_keys_of_whole_pages_need_one_token_more(pages, page_tokens=64):
    def whole_pages(tokens: int) -> int:
        key = RadixKey(array("q", range(tokens)), is_bigram=True)
        return len(key.page_aligned(page_tokens)) // page_tokens

    assert whole_pages(pages * page_tokens) == pages - 1
    assert whole_pages(pages * page_tokens + 1) == pages


@pytest.mark.case("fact_dsa_indexer_pages")
def test_a_dsa_indexer_page_is_one_block_at_the_kv_pages_number(page_tokens=64, layers=61):
    stride = page_tokens * 132
    pool = DSAIndexerPoolHost.__new__(DSAIndexerPoolHost)
    pool.page_size, pool.layout, pool.layer_num = page_tokens, "page_first_direct", layers
    pool.indexer_page_stride_size, pool.indexer_dtype = stride, torch.uint8
    pool.index_k_with_scale_buffer = torch.zeros(10, layers, 1, stride, dtype=torch.uint8)
    pointers, sizes = pool.get_page_buffer_meta(torch.arange(3 * page_tokens, 6 * page_tokens))
    base = pool.index_k_with_scale_buffer.data_ptr()
    assert sizes == [layers * stride] * 3
    assert [pointer - base for pointer in pointers] == [page * layers * stride for page in (3, 4, 5)]


@pytest.mark.case("two_requests_one_room")
def test_two_promises_of_one_room_leave_no_page_locked(engine):
    engine = engine("decode")
    tokens = prompt(PAGES)
    engine.store_holds(tokens)
    transfers = engine.sglang.scheduler.disagg_decode_transfer_queue
    transfers.holding = True
    first = engine.arrives(tokens)
    engine.planned(first, None, PAGES)
    peer = Peer(engine)
    load = peer.pulls(first.bootstrap_room, PAGES)
    engine.until(lambda: engine.admitted(first) and not load.lanes_open, "the first one was promised")
    second = engine.arrives(tokens, room=first.bootstrap_room)
    engine.until(lambda: engine.admitted(second), "the second one was promised")
    assert engine.held > 0
    for req in (first, second):
        engine.aborts(req)
    engine.becomes_idle()


@pytest.mark.case("two_requests_one_room")
def test_two_queued_requests_of_one_room_exchange_no_page(engine):
    engine = engine("decode")
    peer, one, other = Peer(engine), prompt(PAGES), prompt(PAGES)
    engine.store_holds(one)
    engine.store_holds(other)
    first = engine.arrives(one)
    second = engine.arrives(other, room=first.bootstrap_room)
    engine.planned(first, peer, PAGES)
    load = peer.pulls(first.bootstrap_room, PAGES)
    engine.until(lambda: engine.admitted(first) and engine.admitted(second), "both admitted")
    engine.until(lambda: not load.lanes_open, "the pull ended")
    assert peer.wrong(load, one) == 0
    assert all(engine.in_tree(one)) and all(engine.in_tree(other))
    engine.becomes_idle()


@pytest.mark.case("two_requests_one_room")
def test_two_prompts_of_one_room_get_their_own_pages_on_the_prefill_engine(engine):
    engine = engine("prefill")
    peer, one, other = Peer(engine), prompt(PAGES), prompt(PAGES)
    engine.store_holds(one)
    engine.store_holds(other)
    first = engine.arrives(one)
    engine.until(lambda: engine.reports(first), "report")
    second = engine.arrives(other, room=first.bootstrap_room)
    peer.has(first, one)
    engine.planned(first, peer, PAGES)
    engine.until(lambda: engine.admitted(first) and engine.admitted(second), "both loaded")
    assert engine.in_tree(one) == engine.in_tree(other) == [True] * PAGES
    for req in (first, second):
        engine.finishes(req)
    engine.becomes_idle()


@pytest.mark.case("two_requests_one_room")
def test_two_pulls_of_one_room_both_end(engine):
    engine = engine("decode", settings={"subscribe_timeout_s": 1.0})
    peer = Peer(engine, peer_timeout_s=2.0)
    loads = [peer.pulls(77, 4), peer.pulls(77, 4)]
    engine.until(lambda: not any(load.lanes_open for load in loads), "both pulls ended")
