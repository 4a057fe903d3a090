"""A relay's reads of a real store over TCP, without waiting in Mooncake's client."""

import itertools
import signal

import pytest

from dualpath_sgl.evals.relay.world import HOST, MIB, Objects, Store
from dualpath_sgl.relay.memory import Memory
from dualpath_sgl.relay.settings import Settings
from dualpath_sgl.relay.store import NOT_FOUND, TRANSFER_FAILED, MooncakeReads, PolledReads

SIZES = [64 * 1024, MIB, 300_000, 2 * MIB]


class Ring:
    def __init__(self, master: str) -> None:
        self.memory = Memory(8 * MIB)
        self.reads = PolledReads(MooncakeReads(Settings(master=master), self.memory), HOST, self.memory)

    def read(self, keys: list[str], sizes: list[int]) -> tuple[list[int], list[int]]:
        """Results, and where each object was to go."""
        addresses = list(itertools.accumulate(sizes, initial=self.memory.address))[:-1]
        return self.reads.read(keys, addresses, sizes), addresses


@pytest.fixture(scope="module")
def ring(store):
    return Ring(store.master)


@pytest.fixture
def objects(store):
    stored = Objects(store.client, SIZES)
    yield stored
    stored.free()


def test_every_byte_of_objects_of_any_size_comes(ring, objects):
    got, addresses = ring.read(objects.keys, objects.sizes)
    assert got == SIZES
    objects.pointers = addresses
    assert objects.wrong() == []


def test_an_object_that_is_not_there_does_not_keep_others_away(ring, objects):
    got, _ = ring.read([objects.keys[0], "nowhere", objects.keys[2]], [SIZES[0], 1000, SIZES[2]])
    assert got == [SIZES[0], NOT_FOUND, SIZES[2]]


def test_an_object_of_another_size_is_what_mooncakes_own_client_says_of_it(ring, objects):
    asked = [SIZES[0], SIZES[1] - 1, SIZES[2] + 1]
    got, addresses = ring.read(objects.keys[:3], asked)
    assert got[0] == SIZES[0]
    assert got[1:] == ring.reads._reads.read(objects.keys[1:3], addresses[1:], asked[1:])
    assert got[1] != asked[1] and got[2] != asked[2]


def test_an_object_that_goes_while_it_is_read_does_not_count(ring, objects, store, monkeypatch):
    forwarder = ring.reads._forwarder
    read = forwarder.read

    def read_and_lose(*arguments):
        arrived = read(*arguments)
        assert store.client.remove(objects.keys[1], True) == 0
        return arrived

    monkeypatch.setattr(forwarder, "read", read_and_lose)
    got, _ = ring.read(objects.keys, objects.sizes)
    assert got == [SIZES[0], TRANSFER_FAILED, *SIZES[2:]]


def test_a_dead_store_node_brings_nothing():
    dying = Store(64 * MIB)
    try:
        ring, objects = Ring(dying.master), Objects(dying.client, SIZES)
        assert ring.read(objects.keys, objects.sizes)[0] == SIZES
        dying.node.send(signal.SIGKILL)
        dying.node.process.wait()
        assert set(ring.read(objects.keys, objects.sizes)[0]) <= {TRANSFER_FAILED, NOT_FOUND}
    finally:
        dying.end()
