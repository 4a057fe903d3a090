"""The store lane: SGLang's batch reader over a page store, its queue in bytes and its rate.

A store that fails, or waits, cannot be ordered from Mooncake at will: RamStore is one.
"""

from __future__ import annotations

import os
import threading

import pytest
import torch
import zmq
from data_path_world import (
    FINGERPRINT,
    WAIT_S,
    Rank,
    acknowledgements,
    eventually,
    given_back,
    page_numbers,
    rooms,
    until_acknowledged,
)

from dualpath_sgl.lanes import store_lane
from dualpath_sgl.lanes.peer_lane import PeerLane
from dualpath_sgl.lanes.store_lane import StoreLane
from dualpath_sgl.threads.priority import WAITING_NICENESS

PAGES = 10


@pytest.fixture(scope="module")
def rank() -> Rank:
    return Rank(pages=128)


@pytest.fixture(scope="module")
def lane() -> StoreLane:
    lane = StoreLane()
    lane.start()
    return lane


@pytest.fixture(autouse=True)
def fresh(rank, monkeypatch):
    rank.pool.clear()
    store = rank.controller.storage_backend
    store.pages.clear(), store.reads.clear()
    store.before_read = lambda hashes: None
    acknowledgements(rank.controller)
    # Three pages a read, so that a load takes several.
    for limit in ("LEAST_BATCH_BYTES", "MOST_BATCH_BYTES"):
        monkeypatch.setattr(store_lane, limit, 3 * rank.page_bytes + 1)


def stored(rank: Rank, pages: int = PAGES, held: int = PAGES):
    """A load and the bytes of it that the store holds."""
    load = rank.load(pages)
    content = torch.randn(held, *rank.landed(load).shape[1:])
    rank.store(load, content)
    return load, content


def read_alone(lane: StoreLane, load, first: int = 0, end: int | None = None) -> None:
    lane.submit(load, first, load.pages if end is None else end)
    load.close_part()


def test_every_page_is_read_once_and_lands_whole(rank, lane):
    load, content = stored(rank)
    read_alone(lane, load)
    acks = until_acknowledged(load)
    assert [ack.completed_tokens for ack in acks[:-1]] == [12, 24, 36, 40]
    assert torch.equal(rank.landed(load), content)
    assert rank.controller.storage_backend.reads == load.operation.hash_value
    assert lane.queue_bytes == 0 and lane.rate_bytes_per_s > 0
    assert load.lane_work[0].record().bytes == PAGES * rank.page_bytes


def test_the_lane_gives_way_to_threads_that_compute(lane):
    eventually(lambda: os.getpriority(os.PRIO_PROCESS, lane.native_id) >= WAITING_NICENESS, "lane is polite")


def test_a_part_reads_only_its_own_pages(rank, lane):
    load, content = stored(rank)
    before = rank.landed(load)
    read_alone(lane, load, 4, 9)
    until_acknowledged(load)
    assert torch.equal(rank.landed(load, 4, 9), content[4:9])
    assert torch.equal(rank.landed(load, 0, 4), before[:4])
    assert rank.controller.storage_backend.reads == load.operation.hash_value[4:9]
    assert load.prefix == 0 and lane.queue_bytes == 0
    record = load.lane_work[0].record()
    assert (record.first_page, record.end_page) == (4, 9)


@pytest.mark.parametrize("held", [0, 1, 3, 5, 9])
def test_a_short_read_lands_what_came_and_empties_the_queue(rank, lane, held):
    load, content = stored(rank, held=held)
    read_alone(lane, load)
    acks = until_acknowledged(load)
    assert load.prefix == held and sum(bool(ack.completed_req) for ack in acks) == 1
    assert torch.equal(rank.landed(load, 0, held), content)
    assert lane.queue_bytes == 0
    # Nothing is read behind the first page that is missing, but for the rest of its batch.
    assert len(rank.controller.storage_backend.reads) <= held + 3


def test_a_store_that_raises_ends_the_part_and_spares_the_next(rank, lane):
    load, content = stored(rank)
    seen = []

    def fail_second(hashes):
        seen.append(hashes)
        if len(seen) == 2:
            raise OSError("store is away")

    rank.controller.storage_backend.before_read = fail_second
    read_alone(lane, load)
    until_acknowledged(load)
    assert load.prefix == 3 and lane.queue_bytes == 0
    assert torch.equal(rank.landed(load, 0, 3), content[:3])

    following, _ = stored(rank)
    read_alone(lane, following)
    until_acknowledged(following)
    assert following.prefix == PAGES and lane.queue_bytes == 0


def test_a_cancelled_load_stops_between_batches_and_empties_the_queue(rank, lane):
    load, _ = stored(rank)
    rank.controller.storage_backend.before_read = lambda hashes: load.operation.mark_terminate()
    read_alone(lane, load)
    until_acknowledged(load)
    assert load.prefix == 3 and len(rank.controller.storage_backend.reads) == 3
    assert lane.queue_bytes == 0


def test_the_queue_shows_every_byte_submitted_and_not_yet_read(rank, lane):
    gate = threading.Event()
    entered = threading.Event()

    def wait(_hashes):
        entered.set()
        assert gate.wait(WAIT_S)

    rank.controller.storage_backend.before_read = wait
    first, _ = stored(rank)
    second, _ = stored(rank)
    read_alone(lane, first)
    read_alone(lane, second, 2, 6)
    assert entered.wait(WAIT_S)
    assert lane.queue_bytes == (PAGES + 4) * rank.page_bytes
    gate.set()
    finals = 0
    while finals < 2:
        finals += bool(rank.controller.prefetch_sync_queue.get(timeout=WAIT_S).completed_req)
    eventually(lambda: lane.queue_bytes == 0, "the queue is empty")


@pytest.mark.parametrize(
    "rate_bytes_per_s, pages", [(0, 2), (30, 2), (80, 4), (1e9, 6)], ids=["unknown", "slow", "fast", "faster"]
)
def test_a_read_is_as_long_as_the_measured_rate_fills(rank, monkeypatch, rate_bytes_per_s, pages):
    monkeypatch.setattr(store_lane, "LEAST_BATCH_BYTES", 2 * rank.page_bytes)
    monkeypatch.setattr(store_lane, "MOST_BATCH_BYTES", 6 * rank.page_bytes)
    lane = StoreLane()  # not started: it has only this rate
    lane._recent_bytes, lane._recent_s = rate_bytes_per_s * rank.page_bytes, 1.0
    assert lane.batch_bytes == pytest.approx(pages * rank.page_bytes, abs=1)


def test_prefix_keys_grow_with_the_pages_before_each_batch(rank, lane):
    """SGLang's contract for backends that store by prefix (HiCacheStorageExtraInfo)."""
    load, _ = stored(rank, pages=5, held=5)
    load.operation.prefix_keys = ["root"]
    seen = []
    store = rank.controller.storage_backend
    original = store.batch_get_v1

    def note(hashes, indices, extra):
        seen.append(extra.prefix_keys)
        return original(hashes, indices, extra)

    store.batch_get_v1 = note
    try:
        read_alone(lane, load)
        until_acknowledged(load)
    finally:
        del store.batch_get_v1
    assert seen == [["root"], ["root", *load.operation.hash_value[:3]]]


def test_waiting_for_a_peer_delays_no_store_part(rank, lane):
    """One request waits for a DE; its own store part and other requests' reads go on."""
    socket = zmq.Context.instance().socket(zmq.ROUTER)  # a DE that never answers
    socket.setsockopt(zmq.LINGER, 0)
    try:
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        missing = []
        peer = PeerLane(
            f"tcp://127.0.0.1:{port}", rank.forwarder, FINGERPRINT, 60.0, lambda *call: missing.append(call)
        )
        peer.start()
        load, content = stored(rank)
        peer.submit(load, next(rooms), 4)
        read_alone(lane, load, 4, PAGES)
        eventually(lambda: load._open_parts == 1, "the store part is done")
        assert torch.equal(rank.landed(load, 4, PAGES), content[4:])
        assert load.prefix == 0 and not missing and not acknowledgements(rank.controller)

        other, content = stored(rank)
        read_alone(lane, other)
        until_acknowledged(other)
        assert torch.equal(rank.landed(other), content)

        load.operation.mark_terminate()
        for pull in peer._pulls.values():
            pull.deadline_s = 0  # the DE's time is over
        until_acknowledged(load)
        assert load.prefix == 0 and not missing
    finally:
        socket.close()


# -- a store that hangs --------------------------------------------------------------------------------


@pytest.fixture
def hanging_store(rank, monkeypatch):
    """Reads of the store begin and do not end before the event is set; `(event, reads under way)`."""
    monkeypatch.setattr(store_lane, "HANG_S", 0.2)
    gate, entered = threading.Event(), []

    def wait(hashes):
        entered.append(hashes)
        assert gate.wait(WAIT_S)

    rank.controller.storage_backend.before_read = wait
    yield gate, entered
    gate.set()


def test_a_read_that_hangs_ends_its_load_and_keeps_its_pages_until_it_is_over(rank, hanging_store):
    gate, _ = hanging_store
    lane = StoreLane()
    lane.start()
    load, _ = stored(rank)
    read_alone(lane, load)
    until_acknowledged(load)
    assert load.prefix == 0 and lane.queue_bytes == 0 and len(rank.open_loads) == 1
    held = page_numbers(load.host_indices(0, PAGES))
    assert page_numbers(load.operation.host_indices) == held[3:], "SGLang gets what nobody writes into"
    gate.set()
    eventually(lambda: not len(rank.open_loads), "the read is over")
    assert given_back(rank.controller) == held[:3] and load.prefix == 0


def test_behind_a_read_that_hangs_other_loads_are_read(rank, hanging_store):
    gate, _entered = hanging_store
    lane = StoreLane()
    lane.start()
    hung, _ = stored(rank)
    read_alone(lane, hung)
    until_acknowledged(hung)
    rank.controller.storage_backend.before_read = lambda hashes: None
    load, content = stored(rank)
    read_alone(lane, load)
    until_acknowledged(load)
    assert torch.equal(rank.landed(load), content) and not gate.is_set()


def test_a_store_in_which_many_reads_hang_is_not_asked_until_one_ends(rank, hanging_store):
    gate, entered = hanging_store
    lane = StoreLane()
    lane.start()
    for _ in range(store_lane.MOST_HANGING + 2):
        load, _ = stored(rank)
        read_alone(lane, load)
        until_acknowledged(load)
        assert load.prefix == 0
    assert len(entered) == store_lane.MOST_HANGING
    gate.set()
    eventually(lambda: not len(rank.open_loads), "they are over")
    load, content = stored(rank)
    read_alone(lane, load)
    until_acknowledged(load)
    assert torch.equal(rank.landed(load), content)


def test_a_read_from_a_slow_store_is_no_longer_than_a_second_at_its_rate(rank, monkeypatch):
    monkeypatch.setattr(store_lane, "LEAST_BATCH_BYTES", 100 * rank.page_bytes)
    monkeypatch.setattr(store_lane, "MOST_BATCH_BYTES", 200 * rank.page_bytes)
    lane = StoreLane()  # not started: it has only this rate
    lane._recent_bytes, lane._recent_s = 5 * rank.page_bytes, 1.0
    assert lane.batch_bytes == 5 * rank.page_bytes
