"""A decode engine with SGLang's own tree answers by key for what it holds, and never for anything else."""

from __future__ import annotations

import threading

import pytest
from decode_tree import (
    DEVICE_PAGES,
    HOST_PAGES,
    PAGE_TOKENS,
    DecodeTree,
    Wanted,
    asks,
    prefill_of,
    prompt,
    stored,
    transport_to,
)

from dualpath_sgl.evals.relay.world import eventually
from dualpath_sgl.relay.client.relays import Kind

PAGES, TURN = 40, 30


@pytest.fixture
def tree(own_fresh_process, scene):
    return DecodeTree(scene.store.master)


@pytest.fixture
def wanted(scene, tree):
    """A prompt that the engine has computed, in two turns."""
    tokens = prompt(PAGES, 1)
    tree.compute(tokens[: TURN * PAGE_TOKENS])
    tree.compute(tokens)
    tree.settles()
    wanted = Wanted(scene.store.client, tree.names(tokens), tree.part_bytes)
    yield wanted
    wanted.free()


def test_held_pages_cost_no_read(scene, tree, wanted):
    relay = scene.relay()
    prefill = prefill_of(scene, tree, relay)
    results = asks(scene, prefill, wanted)
    assert results == wanted.sizes
    assert wanted.wrong(tree.bytes_of, results) == []
    assert prefill.counts.forwarded_bytes == wanted.byte_count
    assert prefill.own_keys == [] and relay.reads() == []
    eventually(lambda: tree.server.leased == 0, "nothing is leased")
    assert tree.server.served.bytes == wanted.byte_count
    assert tree.server.served.not_held == tree.server.served.invalid == 0


def test_only_what_is_not_held_is_read(scene, tree, wanted):
    """The end of the prompt was evicted."""
    tree.evict(PAGES - TURN)
    held = [tree.backend._serving.index.find(key) is not None for key in wanted.keys]
    assert held == [True] * 2 * TURN + [False] * 2 * (PAGES - TURN)
    prefill = prefill_of(scene, tree)
    results = asks(scene, prefill, wanted)
    assert results == wanted.sizes
    assert wanted.wrong(tree.bytes_of, results) == []
    assert sorted(prefill.own_keys) == sorted(
        key for key, there in zip(wanted.keys, held, strict=True) if not there
    )


def test_pages_are_served_before_the_store_has_them(scene, tree):
    may_write = threading.Event()
    put = tree.backend._put_batch_zero_copy_impl

    def put_later(*arguments, **named):
        assert may_write.wait(30)
        return put(*arguments, **named)

    tree.backend._put_batch_zero_copy_impl = put_later
    tokens = prompt(PAGES, 2)
    tree.compute(tokens)
    keys = tree.names(tokens)
    index = tree.backend._serving.index

    def is_held() -> bool:
        tree.step()
        return all(index.find(key) for key in keys)

    eventually(is_held, "the pages lie in host memory")
    wanted = Wanted(scene.store.client, keys, tree.part_bytes)
    assert not any(code == 1 for code in stored(scene)(keys))
    prefill = prefill_of(scene, tree)
    results = asks(scene, prefill, wanted)
    assert results == wanted.sizes and prefill.own_keys == []
    may_write.set()
    tree.settles()
    assert wanted.wrong(tree.bytes_of, results) == []
    wanted.free()


def test_what_an_engine_has_read_it_serves(scene, tree, wanted):
    """It comes from the store into other pages than those in which it was computed."""
    tokens = prompt(PAGES, 1)
    tree.flush()
    assert tree.backend._serving.index.find(wanted.keys[0]) is None
    tree.compute(prompt(5, 3))
    tree.settles()
    assert tree.prefetch(tokens) == len(tokens)
    prefill = prefill_of(scene, tree)
    results = asks(scene, prefill, wanted)
    assert results == wanted.sizes and prefill.own_keys == []
    assert wanted.wrong(tree.bytes_of, results) == []


def _rewritten(tree: DecodeTree) -> None:
    """Every page is evicted, and its memory holds another prompt."""
    tree.evict(HOST_PAGES)
    for seed in range(3):
        tree.compute(prompt(DEVICE_PAGES, 100 + seed))
        tree.settles()


def _flushed(tree: DecodeTree) -> None:
    tree.flush()
    tree.compute(prompt(DEVICE_PAGES, 200))
    tree.settles()


@pytest.mark.parametrize("happens", [_rewritten, _flushed])
@pytest.mark.parametrize("when", ["before the fetch", "before the pull", "after the pull"])
def test_pages_that_are_gone_are_read_from_the_store(scene, tree, wanted, happens, when):
    prefill = prefill_of(scene, tree)
    read = transport_to(prefill).read

    def disturbed(*arguments):
        transport_to(prefill).read = read
        if when == "before the pull":
            happens(tree)
        arrived = read(*arguments)
        if when == "after the pull":
            happens(tree)
        return arrived

    transport_to(prefill).read = disturbed
    assert prefill.loader.exist(wanted.keys, stored(scene)) == [1] * len(wanted.keys)
    prefill.loader._whereabouts.settle()
    if when == "before the fetch":
        happens(tree)
    results = prefill.load(wanted)
    assert results == wanted.sizes
    assert wanted.wrong(tree.bytes_of, results) == []
    assert prefill.own_keys
    if when == "before the fetch":
        assert tree.server.served.not_held > 0 and prefill.counts.forwarded_bytes == 0
    else:
        assert tree.server.served.invalid > 0


def test_a_lease_that_is_over_counts_for_nothing(scene, tree, wanted, monkeypatch):
    monkeypatch.setattr(tree.server._leases, "_lease_s", 0.05)
    prefill = prefill_of(scene, tree)
    read = transport_to(prefill).read

    def late(*arguments):
        arrived = read(*arguments)
        eventually(lambda: tree.server.leased == 0, "the lease is over")
        return arrived

    transport_to(prefill).read = late
    results = asks(scene, prefill, wanted)
    assert results == wanted.sizes
    assert wanted.wrong(tree.bytes_of, results) == []
    assert prefill.counts.forwarded_bytes == 0 and tree.server.served.expired > 0


def test_an_engine_that_ends_in_the_middle(scene, tree, wanted):
    prefill = prefill_of(scene, tree, batch_bytes=2**18)
    read = transport_to(prefill).read

    def last(*arguments):
        arrived = read(*arguments)
        tree.server.stop()
        tree.server.join()
        return arrived

    transport_to(prefill).read = last
    results = asks(scene, prefill, wanted)
    assert results == wanted.sizes
    assert wanted.wrong(tree.bytes_of, results) == []
    assert prefill.counts.forwarded_bytes == 0
    assert sorted(prefill.own_keys) == sorted(wanted.keys)
    eventually(lambda: not prefill.loader.lanes_up(Kind.RESIDENT), "it may not be asked")


def test_an_object_of_another_size_is_not_held(scene, tree, wanted):
    prefill = prefill_of(scene, tree)
    other = Wanted(scene.store.client, wanted.keys, tree.part_bytes // 2)
    assert prefill.loader.exist(other.keys, stored(scene)) == [1] * len(other.keys)
    prefill.load(other)
    assert prefill.counts.forwarded_bytes == 0
    assert tree.server.served.not_held > 0
    other.free()
