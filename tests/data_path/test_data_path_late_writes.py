"""Memory belongs to a forward until nothing can be written into it, whatever happens in mid-read."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

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
from stoppable_peer import NEW, OLD, MemoryPeer, memory_peer

from dualpath_sgl.lanes import peer_lane, peer_protocol
from dualpath_sgl.lanes.forward import Forwarder, StillWriting, bound_mooncakes_patience
from dualpath_sgl.lanes.page_load import PageLoad
from dualpath_sgl.lanes.peer_lane import PeerLane
from dualpath_sgl.lanes.peer_protocol import Ended, Pages, Pull, Release, Released
from dualpath_sgl.lanes.store_lane import StoreLane
from scheduler_svc.wire.protocol import encode

MIB = 1 << 20
OTHER = 9
"""What another source fills pages with once a read says that they are free."""


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Mooncake gives up a connection without progress after 2 s, where an engine lets it wait longer."""
    monkeypatch.setenv("MC_TCP_PROGRESS_TIMEOUT_SEC", "2")


# -- one read -------------------------------------------------------------------------------------


class Reader:
    """Memory of ours that a forwarding engine may read into, at the same offsets as at the peer."""

    def __init__(self, peer: MemoryPeer) -> None:
        self.memory = torch.zeros(peer.size, dtype=torch.uint8)
        self._peer = peer
        self._forwarder = Forwarder("127.0.0.1", "tcp", "", [self.memory])
        assert self._forwarder.read(peer.mooncake_address, [self.memory.data_ptr()], [peer.base], [4096])
        self.memory.zero_()

    def read(self, blocks: list[tuple[int, int]], refused: int | None = None, **options) -> bool:
        """Blocks are `(offset, length)`; number `refused` lies outside of what the peer registered."""
        remote = [self._peer.base + offset for offset, _ in blocks]
        if refused is not None:
            remote[refused] += self._peer.size + (1 << 30)
        local = [self.memory.data_ptr() + offset for offset, _ in blocks]
        return self._forwarder.read(
            self._peer.mooncake_address, local, remote, [length for _, length in blocks], **options
        )

    def begun(self) -> bool:
        return bool(self.memory[::4096].any())


@pytest.mark.case("forward_refused_block_late_write")
@pytest.mark.parametrize(
    "blocks, refused",
    [
        ([(number * 8 * MIB, 8 * MIB) for number in range(16)], 0),
        ([(120 * MIB, 4096), (0, 120 * MIB)], 0),
        ([(0, 120 * MIB), (120 * MIB, 4096)], 1),
    ],
    ids=["first of many", "before a long one", "behind a long one"],
)
def test_nothing_is_written_after_a_read_of_which_one_block_was_refused(blocks, refused):
    with memory_peer(128 * MIB) as peer:
        reader = Reader(peer)
        assert not reader.read(blocks, refused)
        reader.memory.fill_(OTHER)
        time.sleep(1)
        assert bool((reader.memory == OTHER).all())


@pytest.mark.case("forward_paused_peer_late_write")
@pytest.mark.parametrize("count", [1, 32])
def test_nothing_is_written_after_a_read_from_a_peer_that_pauses_and_goes_on_with_other_pages(count):
    with memory_peer(256 * MIB) as peer:
        reader = Reader(peer)
        block = peer.size // count
        outcome = []

        def read() -> None:
            whole = reader.read([(number * block, block) for number in range(count)])
            right = whole and bool((reader.memory == OLD).all())
            reader.memory.fill_(OTHER)
            outcome.append((whole, right))

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        eventually(reader.begun, "the first bytes have come")
        peer.pause()
        time.sleep(3)  # longer than Mooncake waits for progress
        assert not outcome, "the read was over before the pause"
        peer.resume(refilled=True)
        thread.join(WAIT_S)
        time.sleep(1)
        (whole, _), late = outcome[0], int((reader.memory[:: block // 2] != OTHER).sum())
        assert not whole and late == 0


def test_a_read_that_is_given_up_is_over_only_when_its_last_transfer_is():
    with memory_peer(256 * MIB) as peer:
        reader = Reader(peer)
        pause = threading.Thread(target=lambda: (eventually(reader.begun, "begun"), peer.pause()))
        pause.start()
        with pytest.raises(StillWriting) as given_up:
            reader.read([(0, peer.size)], patience_s=0.5)
        pause.join()
        assert not given_up.value.over()
        peer.resume()
        eventually(given_up.value.over, "the transfers have ended")
        reader.memory.fill_(OTHER)
        time.sleep(0.5)
        assert bool((reader.memory == OTHER).all())
        reader.memory.zero_()
        assert reader.read([(0, 4096)]) and bool((reader.memory[:4096] == OLD).all())


def test_a_read_given_up_because_its_peer_died_is_over_soon():
    with memory_peer(256 * MIB) as peer:
        reader = Reader(peer)
        pause = threading.Thread(target=lambda: (eventually(reader.begun, "begun"), peer.pause()))
        pause.start()
        with pytest.raises(StillWriting) as given_up:
            reader.read([(0, peer.size)], patience_s=0.5)
        pause.join()
        peer.process.kill()
        eventually(given_up.value.over, "the transfers have failed")


def test_more_blocks_than_mooncakes_queue_for_a_peer_takes_are_read(monkeypatch):
    """Its queue ends at 1,024 blocks, and what waits longer than a second to get in fails."""
    with memory_peer(64 * MIB) as peer:
        reader = Reader(peer)
        assert reader.read([(offset, 4096) for offset in range(0, 32 * MIB, 8192)])
        assert bool((reader.memory[: 32 * MIB].reshape(-1, 2, 4096)[:, 0] == OLD).all())
        assert not reader.memory[: 32 * MIB].reshape(-1, 2, 4096)[:, 1].any()


# -- a whole lane -----------------------------------------------------------------------------------


class OfferingPeer:
    """A DE whose page server's words a test says itself, and whose memory is another process's."""

    def __init__(self, peer: MemoryPeer, page_bytes: int) -> None:
        self.peer = peer
        self._half = page_bytes // 2
        self._socket = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self.endpoint = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"
        self._identity = b""

    def hears(self, kind: type) -> Pull | Release:
        """The next message, which must be of that kind."""
        assert self._socket.poll(WAIT_S * 1000), f"no {kind.__name__}"
        self._identity, frame = self._socket.recv_multipart()
        message = peer_protocol.decode_to_server(frame)
        assert isinstance(message, kind), message
        return message

    def says(self, message) -> None:
        self._socket.send_multipart([self._identity, encode(message)])

    def offers(self, room: int, first: int, count: int) -> None:
        """Pages `[first, first + count)`, which lie one after another in the peer's memory."""
        pointers = [self.peer.base + block * self._half for block in range(2 * first, 2 * (first + count))]
        self.says(
            Pages(
                room=room,
                mooncake_address=self.peer.mooncake_address,
                first_page=first,
                pointers=tuple(pointers),
                sizes=(self._half, self._half),
            )
        )

    def serves(self, room: int, count: int) -> None:
        """A pull of `count` pages, from its beginning to its end."""
        self.hears(Pull)
        self.offers(room, 0, count)
        self.says(Ended(room=room, end_page=count))
        self.hears(Release)
        self.says(Released(room=room, valid=True))

    def close(self) -> None:
        self._socket.close()


class World:
    """A PE with both lanes, and a DE that a test speaks for; eight pages of 1 MiB are a wave."""

    PAGES = 24
    PEER_TIMEOUT_S = 1.5

    def __init__(self) -> None:
        self.rank = Rank(pages=64, page_tokens=64, layer_count=128)
        self.peer = MemoryPeer(self.PAGES * self.rank.page_bytes)
        self.de = OfferingPeer(self.peer, self.rank.page_bytes)
        self.store = StoreLane()
        self.store.start()
        self.missing: list[tuple[PageLoad, int, int, str]] = []
        self.lane = PeerLane(
            self.de.endpoint, self.rank.forwarder, FINGERPRINT, self.PEER_TIMEOUT_S, self._from_store
        )
        self.lane.start()

    def _from_store(self, load: PageLoad, first: int, end: int, reason: str) -> None:
        self.missing.append((load, first, end, reason))
        self.store.submit(load, first, end)

    def pull(self, pages: int) -> tuple[PageLoad, int]:
        """A load that the store holds too, with other bytes than the DE's."""
        load, room = self.rank.load(pages), next(rooms)
        page = torch.empty(2, *self.rank.pool.kv_buffer.shape[2:])
        page.view(torch.uint8).fill_(OTHER)
        self.rank.store(load, [page] * pages)
        self.lane.submit(load, room, pages)
        load.close_part()
        return load, room

    def bytes_of(self, numbers: list[int]) -> torch.Tensor:
        buffer = self.rank.pool.kv_buffer
        return buffer.view(torch.uint8).reshape(2, buffer.shape[1], -1)[:, numbers]

    def fill(self, numbers: list[int]) -> None:
        """Another request has these pages now."""
        buffer = self.rank.pool.kv_buffer
        buffer.view(torch.uint8).view(2, buffer.shape[1], -1)[:, numbers] = OTHER

    def end(self) -> None:
        self.peer.end()
        self.de.close()


@pytest.fixture
def world(monkeypatch) -> Iterator[World]:
    monkeypatch.setattr(peer_lane, "MOST_WAVE_BYTES", 8 * MIB)
    world = World()
    yield world
    world.end()


def numbers_of(load: PageLoad) -> list[int]:
    return page_numbers(load.host_indices(0, load.pages), load.controller.page_size)


def hang_in_the_middle(world: World) -> tuple[PageLoad, int]:
    """A load of which some pages have come when the DE stops in a wave; given up when this returns."""
    load, room = world.pull(world.PAGES)
    world.de.hears(Pull)
    world.de.offers(room, 0, 2)
    eventually(lambda: load.lane_work[0].end_page == 2, "two pages are read")
    world.peer.pause()
    world.de.offers(room, 2, world.PAGES - 2)
    eventually(lambda: world.missing, "the load is given up")
    assert world.missing == [(load, 0, 2, "peer silent")]
    return load, room


@pytest.mark.case("forward_hang_outlasts_peer_timeout")
def test_a_de_that_hangs_in_a_read_costs_its_time_out_and_the_pages_under_way(world):
    load, _ = hang_in_the_middle(world)
    # SGLang gets what the store brought, and every page back but those that are still written to.
    until_acknowledged(load)
    assert load.prefix == 2
    held = numbers_of(load)
    kept_back = world.lane.quarantined_pages
    assert 0 < kept_back < world.PAGES - 2
    freed = page_numbers(load.operation.host_indices, world.rank.pool.page_size)
    assert freed == held[:2] + held[2 + kept_back :]
    assert len(world.rank.open_loads) == 1, "a flush must wait"
    # They belong to nobody; what another request has keeps its bytes when the DE goes on.
    others = held[2 + kept_back :]
    world.fill(others)
    world.peer.resume(refilled=True)
    eventually(lambda: world.lane.quarantined_pages == 0, "nothing is written any more")
    assert given_back(world.rank.controller) == held[2 : 2 + kept_back]
    assert len(world.rank.open_loads) == 0
    assert bool((world.bytes_of(held[:2] + others) == OTHER).all())


@pytest.mark.case("forward_hang_outlasts_peer_timeout")
def test_a_de_that_hangs_before_the_first_contact_costs_its_time_out_and_no_page(world):
    load, room = world.pull(4)
    world.de.hears(Pull)
    world.peer.pause()
    world.de.offers(room, 0, 4)
    until_acknowledged(load)
    assert world.missing == [(load, 0, 4, "peer silent")]
    assert load.prefix == 4 and world.lane.quarantined_pages == 0


def test_a_de_that_hangs_at_the_first_contact_holds_up_no_read_from_another(world):
    """Mooncake would make that contact under a lock that every other read needs."""
    _load, room = world.pull(4)
    world.de.hears(Pull)
    world.peer.pause()
    world.de.offers(room, 0, 4)
    eventually(lambda: world.lane._greeting, "the DE is greeted")
    with memory_peer(4 * world.rank.page_bytes) as other:
        de = OfferingPeer(other, world.rank.page_bytes)
        lane = PeerLane(de.endpoint, world.rank.forwarder, FINGERPRINT, WAIT_S, world._from_store)
        lane.start()
        beside, second_room = world.rank.load(4), next(rooms)
        lane.submit(beside, second_room, 4)
        beside.close_part()
        de.serves(second_room, 4)
        eventually(lambda: not beside.lanes_open, "the other DE's pages are here")
        assert beside.prefix == 4 and bool((world.bytes_of(numbers_of(beside)) == OLD).all())
        de.close()


def test_nothing_more_is_read_from_a_de_that_hangs_and_all_again_when_it_goes_on(world):
    hang_in_the_middle(world)
    refused, _ = world.pull(4)
    eventually(lambda: not refused.lanes_open, "the second load ended")
    assert world.missing[1:] == [(refused, 0, 4, "peer silent")] and refused.prefix == 4
    world.peer.resume()
    eventually(lambda: world.lane.quarantined_pages == 0, "nothing is written any more")
    for _ in range(2):
        world.de.hears(Release)
    load, room = world.pull(4)
    world.de.serves(room, 4)
    eventually(lambda: not load.lanes_open, "the third load ended")
    assert load.prefix == 4 and bool((world.bytes_of(numbers_of(load)) == OLD).all())


def test_a_cancelled_load_that_hangs_keeps_back_the_pages_under_way_too(world):
    load, room = world.pull(world.PAGES)
    world.de.hears(Pull)
    world.de.offers(room, 0, 2)
    eventually(lambda: load.lane_work[0].end_page == 2, "two pages are read")
    world.peer.pause()
    world.de.offers(room, 2, world.PAGES - 2)
    time.sleep(0.3)  # the wave is under way
    load.operation.mark_terminate()
    until_acknowledged(load)
    assert not world.missing and world.lane.quarantined_pages
    kept_back = numbers_of(load)[2 : 2 + world.lane.quarantined_pages]
    freed = page_numbers(load.operation.host_indices, world.rank.pool.page_size)
    assert not set(kept_back) & set(freed)
    world.peer.resume()
    eventually(lambda: world.lane.quarantined_pages == 0, "nothing is written any more")
    assert given_back(world.rank.controller) == kept_back


def test_pages_that_are_free_again_before_the_load_ends_go_back_with_it():
    rank = Rank(pages=8)
    load = rank.load(4)
    load.open_part("peer", 0, load.pages)
    over = load.withhold(1, 3)
    load.close_part()
    over()
    load.close_part()
    until_acknowledged(load)
    assert page_numbers(load.operation.host_indices) == numbers_of(load)
    assert given_back(rank.controller) == [] and len(rank.open_loads) == 0


# -- a slow link ---------------------------------------------------------------------------------------

SLOW_DE = """
import sys, threading, time, torch
from dualpath_sgl.lanes.forward import Forwarder
from dualpath_sgl.lanes.page_server import PageServer
host, fingerprint = sys.argv[1:3]
room, count, block, old, new = map(int, sys.argv[3:])
memory = torch.full((2, count, block), old, dtype=torch.uint8)
forwarder = Forwarder(host, "tcp", "", [memory])
server = PageServer(host, forwarder.mooncake_address, fingerprint, 5.0, 10.0)
server.start()
server.offer(room, 0)
keys, values = memory[0].data_ptr(), memory[1].data_ptr()
server.publish(
    room,
    [(keys + n * block, values + n * block) for n in range(count)],
    (block, block),
    unpin=lambda: memory.fill_(new),
)
server.end(room)
print(server.endpoint, flush=True)
sys.stdin.read()
"""


class SlowLink:
    """A network namespace behind a link of `rate`."""

    def __init__(self, rate: str) -> None:
        tag = os.getpid() % 10_000
        self.here, self.there = (f"10.98.{os.getpid() % 200 + 20}.{side}" for side in (1, 2))
        self._space = f"slow{tag}"
        self.inside = ["nsenter", f"--net=/var/run/netns/{self._space}"]
        self._do(f"ip netns add {self._space}")
        try:
            self._do(f"ip link add slh{tag} type veth peer name sld{tag} netns {self._space}")
            self._do(f"ip addr add {self.here}/24 dev slh{tag}")
            self._do(f"ip link set slh{tag} up")
            self._do(f"ip addr add {self.there}/24 dev sld{tag}", self.inside)
            self._do(f"ip link set sld{tag} up", self.inside)
            self._do("ip link set lo up", self.inside)
            shape = f"tc qdisc add dev sld{tag} root tbf rate {rate} burst 64kb latency 400ms"
            self._do(shape, self.inside)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._do(f"ip netns del {self._space}")

    @staticmethod
    def _do(command: str, prefix: Sequence[str] = ()) -> None:
        subprocess.run([*prefix, *command.split()], check=True, capture_output=True)


@pytest.fixture
def slow_link() -> Iterator[SlowLink]:
    if os.geteuid() or not all(map(shutil.which, ("ip", "tc", "nsenter"))):
        pytest.skip("makes a network namespace with a slow link: needs root, ip, tc and nsenter")
    try:
        link = SlowLink("10mbit")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no slow link can be made here: {error.stderr!r}")
    yield link
    link.close()


@pytest.mark.case("forward_slow_link_wrong_bytes")
def test_a_forward_over_a_link_that_needs_many_leases_arrives_and_stays(slow_link):
    """The DE vouched for its pages once: the PE, which reads on, keeps them pinned."""
    prefill = Rank(8_008, lambda host, *rest: Forwarder(slow_link.here, *rest))
    count, room = 8_000, next(rooms)
    numbers = [str(number) for number in (room, count, prefill.page_bytes // 2, OLD, NEW)]
    decode = subprocess.Popen(
        [*slow_link.inside, sys.executable, "-c", SLOW_DE, slow_link.there, FINGERPRINT, *numbers],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    missing = []
    try:
        endpoint = next(line.strip() for line in decode.stdout if line.startswith("tcp://"))
        lane = PeerLane(endpoint, prefill.forwarder, FINGERPRINT, 3.0, lambda *call: missing.append(call))
        lane.start()
        load = prefill.load(count)
        lane.submit(load, room, count)
        begun_s = time.monotonic()
        load.close_part()
        until_acknowledged(load)
        assert time.monotonic() - begun_s > 5, "the link is not slow"
        time.sleep(1)
        held = prefill.pool.kv_buffer.view(torch.uint8).reshape(2, prefill.pool.kv_buffer.shape[1], -1)
        assert bool((held[:, page_numbers(load.host_indices(0, load.prefix))] == OLD).all())
        assert load.prefix == count and not missing
        assert not acknowledgements(prefill.controller)
    finally:
        decode.kill()
        decode.wait()
        decode.stdin.close()
        decode.stdout.close()


def test_mooncake_waits_ten_seconds_for_progress_unless_told_otherwise(monkeypatch):
    bound_mooncakes_patience()
    assert os.environ["MC_TCP_PROGRESS_TIMEOUT_SEC"] == "2", "what somebody chose stands"
    monkeypatch.delenv("MC_TCP_PROGRESS_TIMEOUT_SEC")
    bound_mooncakes_patience()
    assert os.environ["MC_TCP_PROGRESS_TIMEOUT_SEC"] == "10"
