"""The ring: memory is given away only when nobody has it, and what lies there is found by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualpath_sgl.relay.leases import Leases
from dualpath_sgl.relay.memory import Memory, parse_cores
from dualpath_sgl.relay.ring import Ring
from dualpath_sgl.relay.slots import Slots, slots_for

SLOT = 100
BASE = 1000


def ring(slots: int, keep_s: float = 5.0) -> Ring:
    return Ring(BASE, slots * SLOT, SLOT, keep_s)


def test_what_needs_several_slots_gets_neighbours():
    slots = Slots(5)
    assert [slots.take(2), slots.take(1), slots.take(2)] == [0, 2, 3]
    slots.give_back(0, 2)
    slots.give_back(3, 2)
    assert slots.take(3) is None  # four are free, never three in a row
    assert slots.free_count == 4


def test_a_slot_that_is_free_cannot_be_given_back():
    slots = Slots(2)
    slots.take(1)
    with pytest.raises(ValueError, match="slots 0 to 2"):
        slots.give_back(0, 2)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 4)), max_size=60))
def test_no_slot_has_two_owners(steps):
    slots, owned = Slots(8), []
    for take, count in steps:
        if take:
            first = slots.take(count)
            if first is not None:
                owned.append(range(first, first + count))
        elif owned:
            gone = owned.pop(0)
            slots.give_back(gone.start, len(gone))
        taken = [slot for extent in owned for slot in extent]
        assert len(taken) == len(set(taken)) == slots.count - slots.free_count


@pytest.mark.parametrize(("size", "count"), [(1, 1), (SLOT, 1), (SLOT + 1, 2)])
def test_slots_for_an_amount(size, count):
    assert slots_for(size, SLOT) == count


def test_pinned_memory_is_never_given_away():
    memory = ring(2)
    first, second = memory.take(SLOT), memory.take(SLOT)
    assert memory.take(1) is None
    memory.unpin(second)
    assert memory.take(1).address == second.address
    assert first.pins == 1


def test_what_was_read_is_found_until_its_memory_is_needed():
    memory = ring(2)
    extent = memory.take(SLOT)
    memory.hold(extent, [("a", extent.address, 60), ("b", extent.address + 60, 40)], now_s=0.0)
    memory.unpin(extent)
    assert memory.find("b", 40, 1.0) == (extent, BASE + 60)
    assert memory.free_bytes == 2 * SLOT
    memory.take(2 * SLOT)
    assert memory.find("a", 60, 1.0) is None and memory.find("b", 40, 1.0) is None


def test_what_is_found_and_pinned_stays():
    memory = ring(2)
    extent = memory.take(SLOT)
    memory.hold(extent, [("a", extent.address, 60)], 0.0)
    memory.unpin(extent)
    memory.pin(extent)
    assert memory.take(2 * SLOT) is None
    assert memory.find("a", 60, 1.0) == (extent, extent.address)


def test_the_one_let_go_first_goes_first():
    memory = ring(2)
    old, new = memory.take(SLOT), memory.take(SLOT)
    for extent, key in ((old, "old"), (new, "new")):
        memory.hold(extent, [(key, extent.address, 10)], 0.0)
        memory.unpin(extent)
    memory.take(1)
    assert memory.find("old", 10, 0.0) is None
    assert memory.find("new", 10, 0.0) is not None


def test_what_was_read_long_ago_is_not_given_to_anybody():
    memory = ring(2, keep_s=2.0)
    extent = memory.take(SLOT)
    memory.hold(extent, [("a", extent.address, 60)], now_s=10.0)
    assert memory.find("a", 60, 12.0) is not None
    assert memory.find("a", 60, 12.1) is None


def test_an_object_of_another_size_is_another_object():
    memory = ring(1)
    extent = memory.take(SLOT)
    memory.hold(extent, [("a", extent.address, 60)], 0.0)
    assert memory.find("a", 61, 0.0) is None


def test_a_later_read_of_a_key_takes_the_place_of_the_earlier_one():
    memory = ring(2)
    early, late = memory.take(SLOT), memory.take(SLOT)
    memory.hold(early, [("a", early.address, 60)], 0.0)
    memory.hold(late, [("a", late.address, 60)], 1.0)
    memory.unpin(early)
    assert memory.find("a", 60, 1.0) == (late, late.address)
    assert memory.take(SLOT).address == early.address  # nothing can be found there


def test_a_lease_is_valid_until_its_end_and_once():
    leases, extent = Leases(5.0), ring(1).take(1)
    leases.begin((b"c", 1), [extent], now_s=10.0)
    leases.begin((b"c", 2), [extent], now_s=11.0)
    assert leases.expired(15.0) == []
    assert leases.expired(15.1) == [(b"c", 1)]
    assert leases.end((b"c", 1), 15.1) == (False, [extent])
    assert leases.end((b"c", 2), 16.0) == (True, [extent])
    assert leases.end((b"c", 2), 16.0) == (False, [])
    assert len(leases) == 0


def test_memory_is_as_large_as_asked_for_and_zero():
    import ctypes

    memory = Memory(3 * 4096)
    assert ctypes.string_at(memory.address, memory.byte_count) == bytes(3 * 4096)


@pytest.mark.parametrize(("text", "cores"), [("0-3,8\n", {0, 1, 2, 3, 8}), ("5", {5})])
def test_the_kernels_list_of_cores(text, cores):
    assert parse_cores(text) == cores
