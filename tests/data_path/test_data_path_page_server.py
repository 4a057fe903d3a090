"""What a page server bears from strangers, and what one room's offer may cost another's."""

from __future__ import annotations

import logging
import mmap
import socket
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import zmq
from data_path_world import FINGERPRINT, WAIT_S, eventually, rooms

from dualpath_sgl.lanes import page_server, peer_protocol
from dualpath_sgl.lanes.page_server import PageServer
from dualpath_sgl.lanes.peer_protocol import Ended, Pages, Pull, Reading, Release, Released, Waiting
from dualpath_sgl.launch.processes.ports import FreePorts
from dualpath_sgl.start.dp_rank import port_of_rank
from scheduler_svc.wire.protocol import encode

LONG_S = 60.0
SIZES = (64, 64)


@pytest.fixture(scope="module")
def server() -> PageServer:
    server = PageServer("127.0.0.1", "session", FINGERPRINT, LONG_S, LONG_S)
    server.start()
    return server


class Puller:
    """A socket that speaks to a page server as a peer lane does, or as no peer lane would."""

    def __init__(self, server: PageServer) -> None:
        self._socket = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.connect(server.endpoint)

    def says(self, message) -> None:
        self._socket.send(message if isinstance(message, bytes) else encode(message))

    def hears(self, within_s: float = WAIT_S):
        """The next message that is not Waiting; None when there is none in time."""
        deadline_s = time.monotonic() + within_s
        while self._socket.poll(max(0, deadline_s - time.monotonic()) * 1000):
            message = peer_protocol.decode_to_lane(self._socket.recv())
            if not isinstance(message, Waiting):
                return message
        return None

    def close(self) -> None:
        self._socket.close()


def test_it_listens_where_it_is_told_and_says_how_two_get_ports_of_their_own():
    port = FreePorts("127.0.0.1").take()
    first = PageServer("127.0.0.1", "session", FINGERPRINT, LONG_S, LONG_S, port=port)
    assert first.endpoint == f"tcp://127.0.0.1:{port}"
    with pytest.raises(RuntimeError, match=f"cannot bind port {port} of 127.0.0.1.*DUALPATH_PAGE_PORT"):
        PageServer("127.0.0.1", "session", FINGERPRINT, LONG_S, LONG_S, port=port)


def test_each_rank_of_a_server_has_a_port_of_its_own():
    ranks = [SimpleNamespace(dp_rank=dp, tp_size=2, tp_rank=tp) for dp in range(2) for tp in range(2)]
    assert [port_of_rank(7000, rank) for rank in ranks] == [7000, 7001, 7002, 7003]
    assert {port_of_rank(0, rank) for rank in ranks} == {0}


@pytest.fixture
def puller(server) -> Iterator[Callable[..., Puller]]:
    made = []

    def make(to: PageServer = server) -> Puller:
        made.append(Puller(to))
        return made[-1]

    yield make
    for one in made:
        one.close()


def pull(room: int, end: int = 4, **fields) -> Pull:
    return Pull(**({"room": room, "first_page": 0, "end_page": end, "fingerprint": FINGERPRINT} | fields))


def opened(server: PageServer, pages: int = 4, **fields) -> int:
    room = next(rooms)
    server.offer(room, 0, **fields)
    server.publish(room, [(1000 + 128 * page, 1064 + 128 * page) for page in range(pages)], SIZES)
    server.end(room)
    return room


# -- whose room it is -----------------------------------------------------------------------------------


def test_only_the_lane_that_was_served_confirms_and_ends_a_room(server, puller):
    lane, stranger = puller(), puller()
    room, released = opened(server), []
    server.when_withdrawn(room, lambda: released.append(room))
    lane.says(pull(room))
    assert isinstance(lane.hears(), Pages) and isinstance(lane.hears(), Ended)
    stranger.says(Release(room=room))
    assert stranger.hears() == Released(room=room, valid=False)
    stranger.says(pull(room))
    assert stranger.hears().reason == "pulled by another engine"
    stranger.says(Reading(room=room))
    assert not released and room in server._offers
    lane.says(Release(room=room))
    assert lane.hears() == Released(room=room, valid=True)
    eventually(lambda: released, "the room is closed")


def test_a_pull_that_waits_is_not_taken_over_by_another_engine(server, puller):
    lane, stranger = puller(), puller()
    room = next(rooms)
    lane.says(pull(room))
    eventually(lambda: room in server._pullers, "the pull has arrived")
    stranger.says(pull(room))
    assert stranger.hears().reason == "pulled by another engine"
    server.offer(room, 0)
    server.publish(room, [(1000, 1064)] * 4, SIZES)
    assert isinstance(lane.hears(), Pages)


def test_a_lane_that_never_pulled_may_let_a_room_go(server, puller):
    room, lane = opened(server), puller()
    lane.says(Release(room=room))
    assert lane.hears() == Released(room=room, valid=False), "nothing was read"
    eventually(lambda: room not in server._offers, "the room is closed")


def test_a_later_life_of_a_room_confirms_nothing_of_the_earlier_one(server, puller):
    room, lane = opened(server), puller()
    lane.says(pull(room))
    assert isinstance(lane.hears(), Pages) and isinstance(lane.hears(), Ended)
    server.offer(room, 0)
    lane.says(Release(room=room))
    assert lane.hears() == Released(room=room, valid=False)


def test_another_version_and_another_prompt_are_refused_by_name(server, puller):
    lane = puller()
    room = opened(server, prompt_hash="mine")
    lane.says(pull(room, version=2))
    assert lane.hears().reason == "peer protocol 2, this engine speaks 1"
    lane.says(pull(room, prompt_hash="yours"))
    assert lane.hears().reason == "another prompt"
    lane.says(Release(room=room))
    assert lane.hears() == Released(room=room, valid=False) and room in server._offers
    lane.says(pull(room, prompt_hash="mine"))
    assert isinstance(lane.hears(), Pages)


# -- leases -----------------------------------------------------------------------------------------------


def test_a_lane_that_reads_on_keeps_its_room_but_not_for_ever(puller, monkeypatch):
    monkeypatch.setattr(page_server, "LEASES_WHILE_READING", 4)
    server = PageServer("127.0.0.1", "session", FINGERPRINT, 0.5, LONG_S)
    server.start()
    lane = puller(server)
    room, closed_s = opened(server), []
    begun_s = time.monotonic()
    server.when_withdrawn(room, lambda: closed_s.append(time.monotonic() - begun_s))
    lane.says(pull(room))
    assert isinstance(lane.hears(), Pages)
    while not closed_s and time.monotonic() - begun_s < WAIT_S:
        lane.says(Reading(room=room))
        time.sleep(0.05)
    assert closed_s and closed_s[0] > 1.5, "it ended with the first lease, or never"
    lane.hears()
    lane.says(Release(room=room))
    assert lane.hears() == Released(room=room, valid=False)


def test_a_lane_that_says_nothing_loses_its_room_with_the_lease(puller):
    server = PageServer("127.0.0.1", "session", FINGERPRINT, 0.3, LONG_S)
    server.start()
    lane = puller(server)
    room = opened(server)
    lane.says(pull(room))
    eventually(lambda: room not in server._offers, "the lease ended")


# -- bounds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2, 5000])
def test_an_offer_of_any_length_comes_in_messages_of_bounded_size(server, puller, blocks):
    lane, room = puller(), next(rooms)
    pages = 600_000 if blocks < 5000 else 5
    server.offer(room, 0)
    server.publish(room, [tuple(range(page, page + blocks)) for page in range(pages)], (64,) * blocks)
    lane.says(pull(room, pages))
    got = 0
    while got < pages:
        message = lane.hears()
        assert isinstance(message, Pages) and message.first_page == got
        assert len(message.pointers) <= max(peer_protocol.MOST_POINTERS, blocks)
        assert message.pointers[0] == got and len(encode(message)) < peer_protocol.MAX_MESSAGE_BYTES / 10
        got += len(message.pointers) // blocks
    assert lane.hears() == Ended(room=room, end_page=pages)


def test_a_long_offer_does_not_keep_another_rooms_pages_waiting(server, puller):
    long, short, other = next(rooms), next(rooms), puller()
    server.offer(long, 0)
    server.publish(long, [(page,) for page in range(2_000_000)], (64,))
    reader = puller()
    reader.says(pull(long, 2_000_000))
    assert reader.hears().first_page == 0
    server.offer(short, 0)
    server.publish(short, [(1,)] * 4, (64,))
    other.says(pull(short))
    assert isinstance(other.hears(), Pages)
    assert server._pullers[long].next_page < 2_000_000, "it came before the long one's end"
    reader.says(Release(room=long))


def test_pulls_for_rooms_that_nobody_opens_are_bounded_and_disturb_no_real_one(server, puller):
    flood, lane = puller(), puller()
    waiting = opened(server)
    early = next(rooms)
    for number in range(20_000):
        flood.says(pull(10**9 + number))
    lane.says(pull(early))
    lane.says(pull(waiting))
    assert isinstance(lane.hears(), Pages)
    eventually(lambda: early in server._pullers, "its pull has arrived")
    server.offer(early, 0)
    server.publish(early, [(1000, 1064)] * 4, SIZES)
    while (message := lane.hears()).room != early:
        pass
    assert isinstance(message, Pages)
    refused = 0
    while (message := flood.hears(1.0)) is not None:
        assert message.reason == "not offered"
        refused += 1
    assert refused >= 20_000 - page_server.EARLY_PULLS - server.offered_rooms
    assert len(server._pullers) <= page_server.EARLY_PULLS + server.offered_rooms


def test_a_flood_of_nonsense_fills_no_log_and_delays_no_pages(server, puller, caplog):
    caplog.set_level(logging.WARNING)
    flood, lane = puller(), puller()
    room = opened(server)
    for _ in range(30_000):
        flood.says(b"x")
    lane.says(pull(room))
    assert isinstance(lane.hears(), Pages)
    flood.says(Release(room=10**9))
    assert flood.hears() == Released(room=10**9, valid=False), "all of it was handled"
    assert 1 <= len(caplog.records) < 20


def test_calls_about_rooms_that_are_not_open_do_nothing(server):
    room = next(rooms)
    server.end(room, "why not")
    server.renew(room)
    server.withdraw(room)
    server.withdraw(room)
    called = []
    server.when_withdrawn(room, lambda: called.append(1))
    server.publish(room, [(1, 2)], SIZES, unpin=lambda: called.append(2))
    assert called == [1, 2] and room not in server._offers


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * mmap.PAGESIZE


def test_a_message_that_never_ends_costs_bounded_memory(server, puller):
    """ZeroMQ bounds each part of a message and keeps any number of them."""
    address, port = server.endpoint.removeprefix("tcp://").split(":")
    room, lane = opened(server), puller()
    before = resident_bytes()
    part = bytes([3]) + (1 << 20).to_bytes(8, "big") + bytes(1 << 20)  # long, and more to come
    with socket.create_connection((address, int(port))) as stranger:
        stranger.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32))
        ready = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
        stranger.sendall(bytes([4, len(ready)]) + ready)
        with pytest.raises(OSError):
            for _ in range(1000):
                stranger.sendall(part)
                time.sleep(0.003)  # a third of a gigabyte a second, also where loopback is faster
    assert resident_bytes() - before < 400 << 20
    lane.says(pull(room))
    assert isinstance(lane.hears(), Pages)
