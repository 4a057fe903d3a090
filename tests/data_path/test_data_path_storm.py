"""A storm of faults over both lanes: whatever happens, nothing wrong lands and nothing stays pinned."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch
from data_path_world import FINGERPRINT, WAIT_S, Rank, acknowledgements, bytes_of, eventually, rooms

from dualpath_sgl.lanes.page_load import PageLoad
from dualpath_sgl.lanes.page_server import PageServer
from dualpath_sgl.lanes.peer_lane import PeerLane
from dualpath_sgl.lanes.store_lane import StoreLane

REQUESTS = 40
FATES = ("well", "well", "ends early", "taken back", "cancelled", "never offered", "stranger", "never asked",
         "stalls", "store fails")  # fmt: skip


class Request:
    """One room: the DE's pages, the PE's load, and what was released how often."""

    def __init__(self, decode: Rank, prefill: Rank, fate: str, chance: random.Random) -> None:
        self.fate = fate
        self.room = next(rooms)
        self.count = chance.randint(1, 9)
        self.wanted = chance.randint(1, self.count)
        self.source = decode.pages(self.count)
        self.content = bytes_of(decode.pool, self.source)
        self.load = prefill.load(self.count)
        self.let_go: list[int] = []
        """One entry per batch: how often its pages were unpinned."""
        held = self.count if fate != "store fails" else self.wanted // 2
        prefill.store(self.load, self.content[:held])

    @property
    def must_be_whole(self) -> bool:
        return self.fate not in ("cancelled", "store fails", "never asked")


def drive(decode: Rank, server: PageServer, request: Request, chance: random.Random) -> None:
    """The DE's part: publish in batches, and spoil the pages of a batch the moment it is unpinned."""
    page = decode.pool.page_size
    if request.fate == "never offered":
        return
    server.offer(request.room, first_page=0)
    stop = request.count // 2 if request.fate in ("ends early", "taken back", "stalls") else request.count
    first = 0
    while first < stop:
        end = min(stop, first + chance.randint(1, 3))
        batch, number = request.source[first * page : end * page], len(request.let_go)
        request.let_go.append(0)

        def unpin(batch=batch, number=number) -> None:
            request.let_go[number] += 1
            decode.pool.kv_buffer[:, [slot // page for slot in batch.tolist()[::page]]] = float("nan")

        server.publish(request.room, *decode.blocks(batch), unpin=unpin)
        first = end
        time.sleep(chance.choice([0, 0, 0.002, 0.01]))
    if request.fate == "taken back":
        server.withdraw(request.room)
    elif request.fate != "stalls":
        server.end(request.room, None if stop == request.count else "storage read fell short")


@pytest.fixture(scope="module")
def cluster():
    """(PE, DE, page server with short limits, store lane, peer lane, peer lane of another layout)"""
    prefill, decode = Rank(pages=512), Rank(pages=512)
    server = PageServer("127.0.0.1", decode.forwarder.mooncake_address, FINGERPRINT, 1.0, 0.5)
    store = StoreLane()

    def from_store(load: PageLoad, first: int, end: int, _reason: str) -> None:
        store.submit(load, first, end)

    lanes = [
        PeerLane(server.endpoint, prefill.forwarder, fingerprint, 5.0, from_store)
        for fingerprint in (FINGERPRINT, "layout-2")
    ]
    for thread in (server, store, *lanes):
        thread.start()
    return prefill, decode, server, store, *lanes


@pytest.mark.parametrize("seed", range(4))
def test_after_a_storm_of_faults_bytes_are_right_and_nothing_is_pinned(cluster, seed):
    prefill, decode, server, store, lane, strange_lane = cluster
    chance = random.Random(seed)
    for rank in (prefill, decode):
        rank.pool.clear()
        rank.pool.kv_buffer.normal_()
        acknowledgements(rank.controller)
    requests = [Request(decode, prefill, chance.choice(FATES), chance) for _ in range(REQUESTS)]

    def side(share: list[Request], side_seed: int) -> None:
        luck = random.Random(side_seed)
        for request in share:
            drive(decode, server, request, luck)

    sides = [
        threading.Thread(target=side, args=(requests[number::4], seed * 10 + number)) for number in range(4)
    ]
    for thread in sides:
        thread.start()
    for request in requests:
        if request.fate != "never asked":
            (strange_lane if request.fate == "stranger" else lane).submit(
                request.load, request.room, request.wanted
            )
        if request.wanted < request.count:
            store.submit(request.load, request.wanted, request.count)
        request.load.close_part()
        if request.fate == "cancelled":
            request.load.operation.mark_terminate()
    for thread in sides:
        thread.join()

    finals: dict[str, int] = {}
    while sum(finals.values()) < REQUESTS:
        ack = prefill.controller.prefetch_sync_queue.get(timeout=WAIT_S)
        if ack.completed_req:
            finals[ack.rid] = finals.get(ack.rid, 0) + 1
    assert finals == {request.load.operation.request_id: 1 for request in requests}
    eventually(lambda: not server._offers and not server._pullers, "every room is closed")
    assert server.offered_rooms == 0 and not lane._pulls and not strange_lane._pulls
    eventually(lambda: store.queue_bytes == 0, "the store queue is empty")
    for request in requests:
        assert request.let_go == [1] * len(request.let_go), request.fate
        landed = prefill.landed(request.load, 0, request.load.prefix)
        assert torch.equal(landed, request.content[: request.load.prefix]), request.fate
        if request.must_be_whole:
            assert request.load.prefix == request.count, request.fate
        prefill.pool.free(request.load.operation.host_indices)
    assert prefill.pool.available_size() == prefill.pool.size
    assert all(thread.is_alive() for thread in (server, store, lane, strange_lane))
