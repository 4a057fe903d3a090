"""Lanes that fail, end, and come again; loads of one room; what one pull may cost the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import zmq
from data_path_world import (
    FINGERPRINT,
    WAIT_S,
    Rank,
    bytes_of,
    eventually,
    rooms,
)

from dualpath_sgl.lanes import peer_lane
from dualpath_sgl.lanes.page_load import PageLoad
from dualpath_sgl.lanes.page_server import PageServer
from dualpath_sgl.lanes.peer_lane import PeerLane
from dualpath_sgl.lanes.peer_lanes import PeerLanes
from dualpath_sgl.lanes.peer_protocol import Waiting
from dualpath_sgl.lanes.store_lane import StoreLane
from dualpath_sgl.threads import faults, priority
from dualpath_sgl.threads.mailbox import Mailbox
from scheduler_svc.wire.protocol import encode

LONG_S = 60.0
PAGES = 4


@pytest.fixture(scope="module")
def decode() -> Rank:
    return Rank(pages=64)


@pytest.fixture(scope="module")
def server(decode) -> PageServer:
    server = PageServer("127.0.0.1", decode.forwarder.mooncake_address, FINGERPRINT, LONG_S, LONG_S)
    server.start()
    return server


@pytest.fixture(scope="module")
def prefill() -> Rank:
    return Rank(pages=64)


def ended(load: PageLoad) -> None:
    eventually(lambda: not load.lanes_open, "the load ended")


class Lanes:
    """The lanes of a PE rank, as its side makes them, and what they called missing."""

    def __init__(self, prefill: Rank, timeout_s: float) -> None:
        self.missing: list[tuple[PageLoad, int, int, str]] = []
        self.made: list[PeerLane] = []
        self._prefill, self._timeout_s = prefill, timeout_s
        self.lanes = PeerLanes(self._make, FINGERPRINT)

    def _make(self, endpoint: str, _engine_id: str, fingerprint: str) -> PeerLane:
        self.made.append(
            PeerLane(endpoint, self._prefill.forwarder, fingerprint, self._timeout_s, self.on_missing)
        )
        return self.made[-1]

    def on_missing(self, *call) -> None:
        self.missing.append(call)

    def pull(self, endpoint: str, room: int, pages: int = PAGES, prompt_hash: str | None = None) -> PageLoad:
        load = self._prefill.load(pages)
        try:
            self.lanes.submit(endpoint, "decode-0", load, room, pages, prompt_hash)
        finally:
            load.close_part()
        return load


@pytest.fixture
def lanes(prefill) -> Lanes:
    prefill.pool.clear()
    return Lanes(prefill, LONG_S)


@pytest.fixture
def offered(decode, server) -> Callable[[], tuple[int, torch.Tensor]]:
    """Opens a room with `PAGES` pages: `(room, their bytes)`."""
    decode.pool.clear()

    def offer(prompt_hash: str | None = None) -> tuple[int, torch.Tensor]:
        room, pages = next(rooms), decode.pages(PAGES)
        server.offer(room, 0, prompt_hash)
        server.publish(room, *decode.blocks(pages))
        server.end(room)
        return room, bytes_of(decode.pool, pages)

    return offer


@pytest.fixture
def silent_de() -> Iterator[tuple[str, zmq.Socket]]:
    """`(endpoint, socket)` of a page server whose words a test says itself."""
    socket = zmq.Context.instance().socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, 0)
    yield f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}", socket
    socket.close()


# -- a lane's life ------------------------------------------------------------------------------------


def test_a_lane_without_work_ends_with_its_thread_and_descriptors_and_the_next_load_gets_another(
    prefill, server, lanes, offered, monkeypatch
):
    monkeypatch.setattr(peer_lane, "IDLE_S", 0.2)
    for _ in range(2):
        room, content = offered()
        load = lanes.pull(server.endpoint, room)
        ended(load)
        assert torch.equal(prefill.landed(load), content) and not lanes.missing
        lane = lanes.made[-1]
        lane.join(WAIT_S)
        assert not lane.is_alive() and lane._socket.closed
        with pytest.raises(OSError):
            Mailbox.put(lane._mailbox, None)
    assert len(lanes.made) == 2


def test_lanes_of_engines_that_came_and_went_leave_nothing_behind(lanes, silent_de, monkeypatch):
    monkeypatch.setattr(peer_lane, "IDLE_S", 0.1)
    before = threading.active_count()
    for port in range(1, 9):
        lanes.lanes.let_go(f"tcp://127.0.0.1:{port}", "decode-0", next(rooms))
    eventually(lambda: threading.active_count() <= before, "their threads have ended")
    lanes.lanes.let_go(silent_de[0], "decode-0", next(rooms))
    assert list(lanes.lanes._lanes) == [silent_de[0]]


def test_a_lane_that_waits_for_a_de_is_not_idle(lanes, silent_de, monkeypatch):
    monkeypatch.setattr(peer_lane, "IDLE_S", 0.1)
    load = lanes.pull(silent_de[0], next(rooms))
    threading.Event().wait(0.5)
    assert lanes.made[-1].is_alive() and load.lanes_open


def test_no_work_is_lost_to_lanes_that_end_all_the_time(prefill, server, lanes, offered, monkeypatch):
    monkeypatch.setattr(peer_lane, "IDLE_S", 0.02)
    for number in range(12):
        room, content = offered()
        load = lanes.pull(server.endpoint, room)
        ended(load)
        assert torch.equal(prefill.landed(load), content)
        prefill.pool.clear()
        threading.Event().wait(0.01 * number)
    assert not lanes.missing and len(lanes.made) > 1


@pytest.mark.parametrize("broken", ["a thread that does not start", "no descriptor left"])
def test_a_lane_that_cannot_be_had_raises_and_the_next_one_is_made_anew(
    prefill, server, lanes, offered, monkeypatch, broken
):
    def fails(*_) -> None:
        raise RuntimeError("can't start new thread") if "thread" in broken else OSError(24, "too many files")

    room, content = offered()
    with monkeypatch.context() as patch:
        patch.setattr(*((PeerLane, "start") if "thread" in broken else (Mailbox, "__init__")), fails)
        load = prefill.load(PAGES)
        with pytest.raises((RuntimeError, OSError)):
            lanes.lanes.submit(server.endpoint, "decode-0", load, room, PAGES)
        with pytest.raises((RuntimeError, OSError)):
            lanes.lanes.let_go(server.endpoint, "decode-0", room)
    load.close_part()
    assert not load.lanes_open and not load.lane_work, "the load is the caller's, as before"
    load = lanes.pull(server.endpoint, room)
    ended(load)
    assert torch.equal(prefill.landed(load), content)


def test_a_greeting_that_no_thread_is_left_for_costs_that_load_only(server, lanes, offered, monkeypatch):
    room, _ = offered()
    lane = lanes.lanes._lane(server.endpoint, "decode-0")
    before = faults.count()

    def fails(*_, **__) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(peer_lane.threading, "Thread", fails)
        load = lanes.pull(server.endpoint, room)
        ended(load)
    assert lanes.missing == [(load, 0, PAGES, "fault in the peer lane")]
    assert faults.count() == before + 1
    again, _ = offered()
    load = lanes.pull(server.endpoint, again)
    ended(load)
    assert load.prefix == PAGES and lane.is_alive()


# -- one pull's fault -----------------------------------------------------------------------------------


def raises(*_args, **_kwargs):
    raise ValueError("somebody's fault")


@pytest.mark.parametrize("step", ["its pages' addresses", "its landing", "the read", "handing on"])
def test_a_fault_in_one_pull_ends_it_and_no_other(prefill, server, lanes, offered, monkeypatch, step):
    first, _ = offered()
    second, content = offered()
    load = prefill.load(PAGES)
    with monkeypatch.context() as patch:
        if step == "its pages' addresses":
            patch.setattr(load, "host_indices", raises)
        elif step == "its landing":
            patch.setattr(load, "land", raises)
        elif step == "the read":
            patch.setattr(prefill.forwarder, "read", raises)
        else:
            server.withdraw(first)
            patch.setattr(lanes, "on_missing", raises)
        lanes.lanes.submit(server.endpoint, "decode-0", load, first, PAGES)
        load.close_part()
        ended(load)
    assert load.prefix == 0 and not load.lanes_open
    if step != "handing on":
        handed_on = [call[:3] for call in lanes.missing]
        assert handed_on == ([] if step == "its landing" else [(load, 0, PAGES)])
    behind = lanes.pull(server.endpoint, second)
    ended(behind)
    assert torch.equal(prefill.landed(behind), content)
    assert not lanes.made[-1]._pulls


def test_a_thread_that_may_not_lower_its_priority_works_on(prefill, lanes, monkeypatch):
    def forbidden(*_):
        raise PermissionError(1, "not permitted")

    monkeypatch.setattr(priority.os, "setpriority", forbidden)
    lane = StoreLane()
    lane.start()
    load = prefill.load(PAGES)
    lane.submit(load, 0, PAGES)
    load.close_part()
    ended(load)


# -- rooms that come again --------------------------------------------------------------------------------


@pytest.mark.case("two_requests_one_room")
def test_of_two_loads_of_one_room_the_second_is_not_pulled_and_none_is_lost(prefill, server, lanes, decode):
    room, pages = next(rooms), decode.pages(PAGES)
    first = lanes.pull(server.endpoint, room)
    second = lanes.pull(server.endpoint, room)
    ended(second)
    assert lanes.missing == [(second, 0, PAGES, "another request of this room")]
    server.offer(room, 0)
    server.publish(room, *decode.blocks(pages))
    ended(first)
    assert torch.equal(prefill.landed(first), bytes_of(decode.pool, pages))


def test_a_room_given_up_is_not_pulled_again_before_the_de_has_answered(prefill, silent_de):
    """What the DE still says could be about the first pull: its pages are not pinned any more."""
    endpoint, socket = silent_de
    lanes = Lanes(prefill, 0.3)
    room = next(rooms)
    first = lanes.pull(endpoint, room)
    ended(first)
    second = lanes.pull(endpoint, room)
    ended(second)
    assert [call[3] for call in lanes.missing] == ["peer silent", "another request of this room"]
    assert [len(socket.recv_multipart()) for _ in range(2)] == [2, 2] and not socket.poll(100)


def test_pages_of_a_room_that_was_closed_and_opened_again_meanwhile_do_not_count(
    prefill, server, lanes, decode
):
    """Two requests of one room, one after the other, on the DE: the first one's pages are gone."""
    room, pages = next(rooms), decode.pages(PAGES)
    load = prefill.load(2 * PAGES)
    server.offer(room, 0)
    server.publish(room, *decode.blocks(pages))
    lanes.lanes.submit(server.endpoint, "decode-0", load, room, 2 * PAGES)
    eventually(lambda: load.lane_work[0].end_page == PAGES, "its first pages are read")
    server.offer(room, 0)
    server.publish(room, *decode.blocks(pages))
    server.end(room)
    load.close_part()
    ended(load)
    assert load.prefix == 0
    assert lanes.missing == [(load, 0, 2 * PAGES, "lease ended")]


def test_a_lane_never_gets_another_prompts_pages(prefill, server, lanes, offered):
    room, content = offered("this prompt")
    other = lanes.pull(server.endpoint, room, prompt_hash="another one")
    ended(other)
    assert lanes.missing == [(other, 0, PAGES, "another prompt")]
    assert room in server._offers, "it was not for the other request to end"
    load = lanes.pull(server.endpoint, room, prompt_hash="this prompt")
    ended(load)
    assert torch.equal(prefill.landed(load), content)
    eventually(lambda: room not in server._offers, "the room is closed")


@pytest.mark.parametrize("hashes", [("one", None), (None, "one"), (None, None)])
def test_a_side_that_does_not_say_which_prompt_it_means_is_believed(prefill, server, lanes, offered, hashes):
    room, content = offered(hashes[0])
    load = lanes.pull(server.endpoint, room, prompt_hash=hashes[1])
    ended(load)
    assert torch.equal(prefill.landed(load), content)


# -- patience -----------------------------------------------------------------------------------------------


def test_a_de_that_only_ever_says_wait_is_given_up(prefill, silent_de, monkeypatch):
    monkeypatch.setattr(peer_lane, "WAITS", 2)
    endpoint, socket = silent_de
    timeout_s = 1.5
    lanes = Lanes(prefill, timeout_s)
    room = next(rooms)
    load = lanes.pull(endpoint, room)
    identity, _ = socket.recv_multipart()
    while not socket.poll(100):  # until it lets go
        socket.send_multipart([identity, encode(Waiting(room=room))])
    ended(load)
    assert lanes.missing == [(load, 0, PAGES, "peer offers nothing")]
