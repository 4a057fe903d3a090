"""The list that lanes claim from: each object is one lane's at a time, and ends exactly once."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualpath_sgl.relay import wire
from dualpath_sgl.relay.client.claims import LEAST_BATCH_BYTES, Blocks, Limits, Load, blocks_of
from dualpath_sgl.relay.client.memory.destinations import Destinations
from dualpath_sgl.relay.client.spread import GROUP_BYTES, spread

MIB = 2**20
LIMITS = Limits(batch_bytes=4 * MIB, most_bytes=16 * MIB, lanes=2)


def load(sizes: list[int], relay_of: list[str] | None = None) -> Load:
    return Load([f"key-{i}" for i in range(len(sizes))], [Blocks((0,), (size,)) for size in sizes], relay_of)


def own(load: Load, limits: Limits = LIMITS, only_leftovers: bool = False) -> list[int]:
    return load.claim_own(limits, only_leftovers)


def test_relays_claim_from_the_front_and_the_own_client_from_the_back():
    it = load([MIB] * 100)
    assert it.claim("a", LIMITS).indices == [0, 1, 2, 3]
    assert own(it) == [99, 98, 97, 96]
    assert it.claim("b", LIMITS).indices == [4, 5, 6, 7]
    assert it.left_bytes == 88 * MIB


def test_batches_shrink_towards_the_end():
    it = load([LEAST_BATCH_BYTES // 2] * 64)
    batches = []
    while claim := it.claim("a", LIMITS):
        batches.append(claim.byte_count)
    assert batches == sorted(batches, reverse=True)
    assert batches[0] == 2 * MIB and min(batches[:-1]) == LEAST_BATCH_BYTES


def test_an_object_larger_than_a_batch_is_a_batch():
    assert load([10 * MIB, MIB]).claim("a", LIMITS).indices == [0]


def test_an_object_that_no_relay_takes_is_the_own_clients():
    it = load([20 * MIB, MIB, MIB])
    assert it.claim("a", LIMITS).indices == [1, 2]
    assert own(it) == [0]


def test_a_batch_fits_into_a_message():
    it = load([16] * (2 * wire.MOST_OBJECTS))
    assert len(it.claim("a", LIMITS).indices) == wire.MOST_OBJECTS
    it = Load(["k" * 500] * 900, [Blocks((0,), (16,))] * 900)
    assert len(it.claim("a", LIMITS).indices) == wire.MOST_KEYS_CHARACTERS // 500
    it = Load(["k" * 513, "k"], [Blocks((0,), (16,))] * 2)
    assert it.claim("a", LIMITS).indices == [1]


def test_what_comes_back_is_claimed_before_the_rest():
    it = load([MIB] * 100)
    claim = it.claim("a", LIMITS)
    assert it.give_back(claim)
    assert not it.give_back(claim)
    assert it.claim("b", LIMITS).indices == [0, 1, 2, 3]
    claim = it.claim("a", LIMITS)
    assert it.give_back(claim, to_own=True)
    assert it.claim("b", LIMITS).indices == [8, 9, 10, 11]
    assert own(it) == [4, 5, 6, 7]


def test_what_a_relay_could_not_read_the_own_client_is_asked_for():
    it = load([MIB] * 4)
    claim = it.claim("a", LIMITS)
    assert it.begin_landing(claim)
    it.land(claim, [])
    assert it.claim("b", LIMITS).indices == [1]
    assert own(it)[0] == 0


def test_a_claim_that_is_overdue_is_void():
    it = load([MIB] * 4)
    claim = it.claim("a", LIMITS)
    assert it.take_back_overdue(claim.since_s) == 0
    assert it.take_back_overdue(claim.since_s + 1) == 1
    assert claim.void and not it.begin_landing(claim) and not it.give_back(claim)
    assert own(it)[0] == 0


def test_nothing_is_written_after_close():
    it = load([MIB] * 4)
    landing, late = it.claim("a", LIMITS), it.claim("b", LIMITS)
    assert it.begin_landing(landing)
    closed = threading.Event()

    def close() -> None:
        it.close()
        closed.set()

    threading.Thread(target=close, daemon=True).start()
    assert not closed.wait(0.05)  # a copy is under way
    it.land(landing, landing.indices)
    assert closed.wait(10)
    assert not it.begin_landing(late)
    assert it.claim("a", LIMITS) is None


def test_relays_of_a_shared_load_read_their_own_part_and_help_others_from_its_end():
    it = load([MIB] * 6, ["a", "a", "a", "b", "b", "b"])
    small = LIMITS._replace(batch_bytes=MIB)
    assert [it.claim("a", small).indices[0] for _ in range(4)] == [0, 1, 2, 5]
    assert it.claim("b", small).indices == [3]


def test_the_own_client_of_a_shared_load_takes_leftovers_only():
    it = load([MIB] * 8, ["a"] * 8)
    assert own(it, only_leftovers=True) == []
    claim = it.claim("a", LIMITS)
    it.give_back(claim)
    assert own(it, only_leftovers=True) == claim.indices
    assert own(it) != []


def test_wait_tells_when_every_object_has_its_result():
    it = load([5, 7])
    indices = own(it)
    assert it.wait(0.0)
    it.land_own(indices, [7, -704])
    assert not it.wait(0.0)
    assert it.results == [-704, 7]


@given(st.data())
def test_every_object_ends_once_whatever_lanes_do(data):
    sizes = data.draw(st.lists(st.integers(1, 3 * MIB), min_size=1, max_size=30))
    it = load(sizes)
    claims, reads = [], []
    landed: list[int] = []
    for _ in range(200):
        step = data.draw(
            st.sampled_from(["claim", "own", "land", "land_own", "give_back", "overdue", "refuse"])
        )
        if step == "claim" and (claim := it.claim("a", LIMITS)):
            claims.append(claim)
        elif step == "own" and (indices := own(it)):
            reads.append(indices)
        elif step == "land" and claims:
            claim = claims.pop(data.draw(st.integers(0, len(claims) - 1)))
            if it.begin_landing(claim):
                whole = [i for i in claim.indices if data.draw(st.booleans())]
                it.land(claim, whole)
                landed += whole
        elif step == "land_own" and reads:
            indices = reads.pop()
            it.land_own(indices, [sizes[i] for i in indices])
            landed += indices
        elif step == "give_back" and claims:
            it.give_back(claims.pop(0), to_own=data.draw(st.booleans()))
        elif step == "overdue":
            it.take_back_overdue(time.monotonic() + 1)
    for claim in claims:
        it.give_back(claim)
    for indices in reads:
        it.land_own(indices, [sizes[i] for i in indices])
        landed += indices
    while indices := own(it):
        it.land_own(indices, [sizes[i] for i in indices])
        landed += indices
    assert sorted(landed) == list(range(len(sizes)))
    assert it.results == sizes and it.left_bytes == 0
    assert not it.wait(0.0)


def test_an_object_may_go_into_several_blocks():
    assert blocks_of(5, 7) == Blocks((5,), (7,))
    assert blocks_of([5, 50], [7, 8]).byte_count == 15


def test_ranks_that_share_their_kv_choose_the_same_relay():
    keys = [f"k{i}" for i in range(400)]
    sizes = [64 * 1024] * 400
    two = spread(keys, sizes, ["a", "b"])
    assert two == spread(keys, sizes, ["b", "a"])
    assert 0.25 < two.count("a") / 400 < 0.75
    three = spread(keys, sizes, ["a", "b", "c"])
    moved = [(old, new) for old, new in zip(two, three, strict=True) if old != new]
    assert moved and all(new == "c" for _, new in moved)


def test_neighbours_stay_together():
    chosen = spread([f"k{i}" for i in range(64)], [64 * 1024] * 64, [f"r{i}" for i in range(50)])
    run = GROUP_BYTES // (64 * 1024)
    assert all(len(set(chosen[first : first + run])) == 1 for first in range(0, 64, run))


@pytest.mark.parametrize(
    ("block", "inside"),
    [((10, 5), True), ((14, 2), False), ((9, 2), False), ((100, 10), True), ((20, 1), False)],
)
def test_only_known_memory_is_filled_by_copying(block, inside):
    destinations = Destinations()
    destinations.add(100, 10)
    destinations.add(10, 5)
    destinations.add(100, 10)
    assert destinations.hold([(10, 1), block]) is inside
