"""Page server and peer lane together: real sockets, real Mooncake reads between two host pools."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
import torch
import zmq
from data_path_world import (
    FINGERPRINT,
    WAIT_S,
    Rank,
    acknowledgements,
    bytes_of,
    eventually,
    rooms,
    until_acknowledged,
)

from dualpath_sgl.lanes import peer_protocol
from dualpath_sgl.lanes.forward import Forwarder
from dualpath_sgl.lanes.page_load import PageLoad
from dualpath_sgl.lanes.page_server import PageServer
from dualpath_sgl.lanes.peer_lane import PeerLane
from dualpath_sgl.lanes.peer_protocol import Ended, Pages, Pull, Release, Released
from scheduler_svc.wire.protocol import encode

PAGES = 12
LONG_S = 60.0
"""A limit that must not be what ends a test."""
SHORT_S = 0.3
"""A limit that a test waits for."""

Missing = tuple[int, int, str]


class GatedForwarder(Forwarder):
    """Real reads that report back only when the gate opens: a slow network, made on demand."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.gate = threading.Event()
        self.gate.set()
        self.finished_reads = 0

    def read(self, *arguments) -> bool:
        whole = super().read(*arguments)
        self.finished_reads += 1
        assert self.gate.wait(WAIT_S)
        return whole


@pytest.fixture(scope="module")
def decode() -> Rank:
    return Rank(pages=256)


@pytest.fixture(scope="module")
def prefill() -> Rank:
    return Rank(pages=256, forwarder=GatedForwarder)


@pytest.fixture(autouse=True)
def fresh(decode, prefill):
    for rank in (decode, prefill):
        rank.pool.clear()
        rank.pool.kv_buffer.normal_()
        acknowledgements(rank.controller)
    prefill.forwarder.gate.set()
    prefill.forwarder.finished_reads = 0


def page_server(decode: Rank, lease_s: float, subscribe_timeout_s: float) -> PageServer:
    server = PageServer(
        "127.0.0.1", decode.forwarder.mooncake_address, FINGERPRINT, lease_s, subscribe_timeout_s
    )
    server.start()
    return server


# A server or lane thread lives as long as its process, so the tests of a module share them.


@pytest.fixture(scope="module")
def server(decode) -> PageServer:
    return page_server(decode, LONG_S, LONG_S)


@pytest.fixture(scope="module")
def hasty_server(decode) -> PageServer:
    """Ends leases and gives up waiting for a PE after SHORT_S."""
    return page_server(decode, SHORT_S, SHORT_S)


class Lane:
    """A peer lane and everything it called missing."""

    def __init__(self, prefill: Rank, endpoint: str, timeout_s: float, fingerprint: str = FINGERPRINT):
        self.missing: dict[int, list[Missing]] = {}
        self.lane = PeerLane(endpoint, prefill.forwarder, fingerprint, timeout_s, self._note)
        self.lane.start()

    def _note(self, load: PageLoad, first: int, end: int, reason: str) -> None:
        self.missing.setdefault(id(load), []).append((first, end, reason))

    def pull(self, load: PageLoad, room: int, end: int | None = None) -> None:
        """All that is asked of `load` comes through this lane."""
        self.lane.submit(load, room, load.pages if end is None else end)
        load.close_part()

    def missing_of(self, load: PageLoad) -> list[Missing]:
        return self.missing.get(id(load), [])


@pytest.fixture(scope="module")
def lane(prefill, server) -> Lane:
    return Lane(prefill, server.endpoint, LONG_S)


@pytest.fixture(scope="module")
def hasty_lane(prefill, hasty_server) -> Lane:
    return Lane(prefill, hasty_server.endpoint, LONG_S)


class Calls:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


def nothing_is_left(server: PageServer, lane: Lane, room: int) -> None:
    eventually(lambda: room not in server._offers, "room closed")
    eventually(lambda: room not in server._pullers, "puller gone")
    assert room not in lane.lane._pulls


# -- delivery ------------------------------------------------------------------------------------


def test_a_whole_pull_lands_the_exact_bytes_and_closes_the_room(decode, prefill, server, lane):
    room, pages = next(rooms), decode.pages(PAGES)
    unpin, closed = Calls(), Calls()
    load = prefill.load(PAGES, first_page=5)
    server.offer(room, first_page=5)
    server.publish(room, *decode.blocks(pages), unpin=unpin)
    server.when_withdrawn(room, closed)
    server.end(room)

    lane.pull(load, room)

    assert until_acknowledged(load)[-2].completed_tokens == PAGES * prefill.pool.page_size
    assert torch.equal(prefill.landed(load), bytes_of(decode.pool, pages))
    assert lane.missing_of(load) == []
    nothing_is_left(server, lane, room)
    assert (unpin.count, closed.count) == (1, 1)
    record = load.lane_work[0].record()
    assert (record.lane, record.first_page, record.end_page) == ("peer", 5, 5 + PAGES)
    assert record.bytes == PAGES * prefill.page_bytes


def test_pages_published_before_and_after_the_pull_arrives_all_land(decode, prefill, server, lane):
    room, pages = next(rooms), decode.pages(PAGES)
    batches = [(0, 3), (3, 4), (4, 9), (9, PAGES)]
    unpins = [Calls() for _ in batches]
    load = prefill.load(PAGES)

    def publish(batch: int) -> None:
        first, end = (edge * prefill.pool.page_size for edge in batches[batch])
        server.publish(room, *decode.blocks(pages[first:end]), unpin=unpins[batch])

    server.offer(room, first_page=0)
    publish(0)
    publish(1)
    lane.pull(load, room)
    for batch in (2, 3):
        read = batches[batch][0] * prefill.page_bytes
        eventually(lambda read=read: load.lane_work[0].bytes == read, "the batches so far are read")
        assert load.prefix == 0, "pages count only once the DE has confirmed them"
        publish(batch)
    until_acknowledged(load)
    assert torch.equal(prefill.landed(load), bytes_of(decode.pool, pages))
    assert lane.missing_of(load) == []
    # The first two batches were offered at once.  Of pages that follow each other, keys are one block
    # and values another.
    assert (load.lane_work[0].transfers, load.lane_work[0].blocks) == (3, 6)
    nothing_is_left(server, lane, room)
    assert [unpin.count for unpin in unpins] == [1] * len(batches)


def test_a_pull_that_arrives_before_the_room_opens_waits_for_it(decode, prefill, server, lane):
    room, pages = next(rooms), decode.pages(PAGES)
    load = prefill.load(PAGES)
    lane.pull(load, room)
    eventually(lambda: room in server._pullers, "the pull has arrived")
    server.offer(room, first_page=0)
    server.publish(room, *decode.blocks(pages))
    until_acknowledged(load)
    assert torch.equal(prefill.landed(load), bytes_of(decode.pool, pages))
    nothing_is_left(server, lane, room)


def test_a_pull_of_the_middle_of_an_offer_gets_the_middle(decode, prefill, server, lane):
    room, pages = next(rooms), decode.pages(PAGES)
    load = prefill.load(6, first_page=4)
    server.offer(room, first_page=1)
    server.publish(room, *decode.blocks(pages))
    lane.pull(load, room, end=5)
    until_acknowledged(load)
    size = prefill.pool.page_size
    assert torch.equal(prefill.landed(load, 0, 5), bytes_of(decode.pool, pages[3 * size : 8 * size]))
    assert load.prefix == 5
    nothing_is_left(server, lane, room)


def test_a_quiet_but_living_de_is_waited_for(decode, prefill, server):
    room, pages = next(rooms), decode.pages(2)
    patient = Lane(prefill, server.endpoint, timeout_s=1.5)  # the DE speaks up every WAITING_S
    load = prefill.load(2)
    server.offer(room, first_page=0)
    patient.pull(load, room)
    # Two signs of life, each restarting the lane's clock, then the pages.
    pull = lambda: patient.lane._pulls[room]  # noqa: E731
    for _ in range(2):
        eventually(lambda: room in patient.lane._pulls, "the pull is known")
        before_s = pull().deadline_s
        eventually(lambda before_s=before_s: pull().deadline_s > before_s, "a sign of life")
    server.publish(room, *decode.blocks(pages))
    until_acknowledged(load)
    assert patient.missing_of(load) == [] and load.prefix == 2
    nothing_is_left(server, patient, room)


# -- less than planned ---------------------------------------------------------------------------


def test_an_offer_that_ends_early_leaves_exactly_the_rest_to_another_source(decode, prefill, server, lane):
    room, pages = next(rooms), decode.pages(7)
    load = prefill.load(PAGES)
    server.offer(room, first_page=0)
    server.publish(room, *decode.blocks(pages))
    server.end(room, "storage read fell short")
    lane.pull(load, room)
    until_acknowledged(load)
    assert lane.missing_of(load) == [(7, PAGES, "storage read fell short")]
    assert load.prefix == 7
    assert torch.equal(prefill.landed(load, 0, 7), bytes_of(decode.pool, pages))
    nothing_is_left(server, lane, room)


def test_a_part_that_waits_for_another_source_keeps_the_load_open(decode, prefill, server):
    """`on_missing` opens its own part before the lane closes its one."""
    room = next(rooms)
    load = prefill.load(3)
    finals_seen = []

    def on_missing(load: PageLoad, first: int, end: int, _reason: str) -> None:
        load.open_part("store", first, end)
        finals_seen.append(any(ack.completed_req for ack in acknowledgements(prefill.controller)))

    other = PeerLane(server.endpoint, prefill.forwarder, FINGERPRINT, LONG_S, on_missing)
    other.start()
    server.offer(room, first_page=0)
    server.end(room, "nothing")
    other.submit(load, room, 3)
    load.close_part()
    eventually(lambda: finals_seen and room not in other._pulls, "the lane let go")
    assert finals_seen == [False] and load._open_parts == 1
    load.close_part()
    assert until_acknowledged(load)


def test_another_layout_is_refused_and_nothing_is_read(decode, prefill, server):
    room, pages = next(rooms), decode.pages(PAGES)
    unpin = Calls()
    stranger = Lane(prefill, server.endpoint, LONG_S, fingerprint="layout-2")
    load = prefill.load(PAGES)
    server.offer(room, first_page=0)
    server.publish(room, *decode.blocks(pages), unpin=unpin)
    stranger.pull(load, room)
    until_acknowledged(load)
    assert stranger.missing_of(load) == [(0, PAGES, "layout differs")]
    assert prefill.forwarder.finished_reads == 0
    nothing_is_left(server, stranger, room)
    assert unpin.count == 1


def test_a_room_that_is_never_offered_ends_the_pull(prefill, hasty_server, hasty_lane):
    room, load = next(rooms), prefill.load(4)
    hasty_lane.pull(load, room)
    until_acknowledged(load)
    assert hasty_lane.missing_of(load) == [(0, 4, "not offered")]
    nothing_is_left(hasty_server, hasty_lane, room)


def test_a_room_that_closed_before_the_pull_is_refused_at_once(prefill, server, lane):
    room, load = next(rooms), prefill.load(4)
    server.offer(room, 0)
    server.withdraw(room)
    lane.pull(load, room)
    until_acknowledged(load)  # long before the server's subscribe time-out
    assert lane.missing_of(load) == [(0, 4, "lease ended")]
    nothing_is_left(server, lane, room)


def test_a_room_that_nobody_asks_for_closes_long_before_its_lease_ends(decode):
    room = next(rooms)
    unpin, closed = Calls(), Calls()
    server = page_server(decode, lease_s=LONG_S, subscribe_timeout_s=SHORT_S)
    server.offer(room, first_page=0)
    server.publish(room, *decode.blocks(decode.pages(2)), unpin=unpin)
    server.when_withdrawn(room, closed)
    eventually(lambda: closed.count, "the room closed")
    assert (unpin.count, closed.count) == (1, 1) and room not in server._offers


def test_what_is_published_or_awaited_after_the_close_is_let_go_at_once(decode, server):
    room = next(rooms)
    unpin, closed = Calls(), Calls()
    server.offer(room, first_page=0)
    server.withdraw(room)
    server.publish(room, *decode.blocks(decode.pages(2)), unpin=unpin)
    server.when_withdrawn(room, closed)
    server.end(room)
    server.withdraw(room)
    assert (unpin.count, closed.count) == (1, 1) and room not in server._offers


# -- pages taken back while they are read --------------------------------------------------------


def test_a_read_that_ends_after_its_room_was_closed_does_not_count(decode, prefill, server, lane):
    room, pages = next(rooms), decode.pages(PAGES)
    unpin = Calls()
    load = prefill.load(PAGES)
    prefill.forwarder.gate.clear()
    server.offer(room, first_page=0)
    server.publish(room, *decode.blocks(pages), unpin=unpin)
    lane.pull(load, room)
    eventually(lambda: prefill.forwarder.finished_reads == 1, "the read is under way")
    server.withdraw(room)
    assert unpin.count == 1
    prefill.forwarder.gate.set()
    until_acknowledged(load)
    assert load.prefix == 0
    assert [missing[:2] for missing in lane.missing_of(load)] == [(0, PAGES)]
    record = load.lane_work[0].record()
    assert (record.end_page - record.first_page, record.bytes) == (0, 0)
    nothing_is_left(server, lane, room)


def test_a_lease_that_ends_during_the_pull_voids_all_that_was_read(decode, prefill, hasty_server, hasty_lane):
    room, pages = next(rooms), decode.pages(PAGES)
    unpin = Calls()
    load = prefill.load(PAGES)
    prefill.forwarder.gate.clear()
    hasty_server.offer(room, first_page=0)
    hasty_server.publish(room, *decode.blocks(pages), unpin=unpin)
    hasty_server.end(room)
    hasty_lane.pull(load, room)
    eventually(lambda: unpin.count == 1, "the lease ends while the read is under way")
    prefill.forwarder.gate.set()
    until_acknowledged(load)
    assert load.prefix == 0
    assert [missing[:2] for missing in hasty_lane.missing_of(load)] == [(0, PAGES)]
    nothing_is_left(hasty_server, hasty_lane, room)


def test_a_room_whose_pages_are_still_being_read_outlives_its_lease(
    decode, prefill, hasty_server, hasty_lane
):
    """A long storage queue is no reason to take pages back: the DE owns them while it reads."""
    room, pages = next(rooms), decode.pages(PAGES)
    load = prefill.load(PAGES)
    hasty_server.offer(room, first_page=0)
    hasty_lane.pull(load, room)
    for _ in range(20):
        hasty_server.renew(room)
        threading.Event().wait(SHORT_S / 5)
    assert hasty_server.offered_rooms == 1
    hasty_server.publish(room, *decode.blocks(pages))
    hasty_server.end(room)
    until_acknowledged(load)
    assert (load.prefix, hasty_lane.missing_of(load)) == (PAGES, [])
    nothing_is_left(hasty_server, hasty_lane, room)


def test_taking_every_room_back_ends_every_pull(decode, prefill, server, lane):
    unpins, loads, opened = [], [], []
    for _ in range(5):
        room, unpin, load = next(rooms), Calls(), prefill.load(4)
        server.offer(room, first_page=0)
        server.publish(room, *decode.blocks(decode.pages(2)), unpin=unpin)
        lane.pull(load, room)
        unpins.append(unpin), loads.append(load), opened.append(room)
    for load in loads:
        eventually(lambda load=load: load.lane_work[0].bytes, "its first pages are read")
    server.withdraw_all()
    assert server.offered_rooms == 0 and [unpin.count for unpin in unpins] == [1] * 5
    # The lane hears of it with the next sign of life, at the latest after the subscribe time.
    for room in opened:
        server._pullers[room].since_s -= LONG_S  # that time passes
    for load in loads:
        eventually(lambda load=load: lane.missing_of(load), "its pages are fetched elsewhere")
        assert [missing[:2] for missing in lane.missing_of(load)] == [(0, 4)] and load.prefix == 0
    for room in opened:
        nothing_is_left(server, lane, room)


# -- SGLang gives the load up --------------------------------------------------------------------


def test_a_cancelled_load_releases_the_room_and_asks_nobody_else(decode, prefill, server, lane):
    room = next(rooms)
    unpin = Calls()
    load = prefill.load(PAGES)
    server.offer(room, first_page=0)
    server.publish(room, *decode.blocks(decode.pages(3)), unpin=unpin)
    lane.pull(load, room)
    eventually(lambda: load.lane_work[0].bytes, "its first pages are read")
    load.operation.mark_terminate()
    acks = until_acknowledged(load)
    assert sum(bool(ack.completed_req) for ack in acks) == 1
    assert lane.missing_of(load) == []
    nothing_is_left(server, lane, room)
    assert unpin.count == 1


# -- a DE that misbehaves ------------------------------------------------------------------------


@contextmanager
def scripted_de(answers: Callable[[object], list[bytes]]) -> Iterator[str]:
    """A page server that answers each message with the given frames."""
    socket = zmq.Context.instance().socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, 0)
    endpoint = f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}"
    stopping = threading.Event()

    def serve() -> None:
        while not stopping.is_set():
            if socket.poll(20):
                identity, frame = socket.recv_multipart()
                for answer in answers(peer_protocol.decode_to_server(frame)):
                    socket.send_multipart([identity, answer])

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        stopping.set()
        thread.join()
        socket.close()


def wire(message) -> bytes:
    return encode(message)


def test_a_silent_de_is_given_up_after_the_timeout(prefill):
    asked = []

    def silent(message) -> list[bytes]:
        asked.append(message)
        return []

    with scripted_de(silent) as endpoint:
        lane = Lane(prefill, endpoint, SHORT_S)
        room, load = next(rooms), prefill.load(4)
        lane.pull(load, room)
        until_acknowledged(load)
        assert lane.missing_of(load) == [(0, 4, "peer silent")]
        assert load.prefix == 0 and room not in lane.lane._pulls
        eventually(lambda: len(asked) == 2, "the DE is told")
    assert isinstance(asked[0], Pull) and asked[1] == Release(room=room)


def test_a_de_that_does_not_confirm_makes_nothing_count(decode, prefill):
    """Pages and their end come, the answer to the release does not."""
    pages = decode.pages(4)
    pointers, sizes = decode.blocks(pages)

    def answers(message) -> list[bytes]:
        if isinstance(message, Release):
            return []
        flat = tuple(pointer for page in pointers for pointer in page)
        address = decode.forwarder.mooncake_address
        return [
            wire(
                Pages(room=message.room, mooncake_address=address, first_page=0, pointers=flat, sizes=sizes)
            ),
            wire(Ended(room=message.room, end_page=4)),
        ]

    with scripted_de(answers) as endpoint:
        lane = Lane(prefill, endpoint, SHORT_S)
        load = prefill.load(4)
        lane.pull(load, next(rooms))
        until_acknowledged(load)
        assert prefill.forwarder.finished_reads == 1
        assert lane.missing_of(load) == [(0, 4, "peer silent")] and load.prefix == 0


def offers(decode: Rank) -> dict[str, dict]:
    """Fields of a Pages message that are wrong in one way each; four pages from page 0 are due."""
    pointers, sizes = decode.blocks(decode.pages(8))
    four = tuple(pointer for page in pointers[:4] for pointer in page)
    eight = tuple(pointer for page in pointers for pointer in page)
    right = {
        "mooncake_address": decode.forwarder.mooncake_address,
        "first_page": 0,
        "pointers": four,
        "sizes": sizes,
    }
    return {
        "skips a page": right | {"first_page": 1},
        "more pages than asked": right | {"pointers": eight},
        "blocks of another size": right | {"sizes": tuple(size // 2 for size in sizes)},
        "one block per page": right | {"sizes": (sum(sizes),)},
        "memory it did not register": right | {"pointers": tuple(p + 2**40 for p in four)},
        "pages of a dead engine": right | {"mooncake_address": "127.0.0.1:1"},
        "a Mooncake address that is none": right | {"mooncake_address": "nowhere"},
        "half a page": right | {"pointers": four[:-1]},
        "pages without blocks": right | {"sizes": ()},
    }


@pytest.mark.parametrize(
    "fault",
    [
        "skips a page",
        "more pages than asked",
        "blocks of another size",
        "one block per page",
        "memory it did not register",
        "pages of a dead engine",
        "a Mooncake address that is none",
        "half a page",
        "pages without blocks",
    ],
)
def test_an_offer_that_does_not_fit_is_not_read_and_the_lane_goes_on(decode, prefill, fault):
    wrong = offers(decode)[fault]
    good = wire(Ended(room=0, end_page=0, reason="nothing here"))
    bad_room, next_room = next(rooms), next(rooms)

    def answers(message) -> list[bytes]:
        if isinstance(message, Release):
            return [wire(Released(room=message.room, valid=True))]
        if message.room == bad_room:
            return [wire(Pages(room=bad_room, **wrong)), wire(Ended(room=bad_room, end_page=4))]
        return [good.replace(b'"room":0', b'"room":%d' % message.room)]

    with scripted_de(answers) as endpoint:
        lane = Lane(prefill, endpoint, timeout_s=5.0)
        load = prefill.load(4)
        before = prefill.landed(load)
        lane.pull(load, bad_room)
        eventually(
            lambda: lane.missing_of(load) or not lane.lane.is_alive(), "its pages are fetched elsewhere"
        )
        assert lane.lane.is_alive(), "one bad message must not end the lane"
        assert [missing[:2] for missing in lane.missing_of(load)] == [(0, 4)] and load.prefix == 0
        assert torch.equal(prefill.landed(load), before)
        after = prefill.load(4)
        lane.pull(after, next_room)
        eventually(lambda: lane.missing_of(after), "the next pull ends too")
        assert lane.missing_of(after) == [(0, 4, "nothing here")]


GARBAGE = [
    b"",
    b"\xff\xfe\x00",
    b"null",
    b"[1, 2]",
    b'{"type": "pull"}',
    b'{"type": "shutdown", "room": 1}',
    b'{"type": "release", "room": -1}',
    b'{"type": "released", "room": 1, "valid": "perhaps"}',
    b'{"type": "pages", "room": 1, "session": "", "first_page": 0, "pointers": [], "sizes": []}',
    b"{" * 100_000,
]


def test_a_lane_ignores_malformed_frames_and_words_about_strangers(decode, prefill):
    pages = decode.pages(4)
    pointers, sizes = decode.blocks(pages)

    def answers(message) -> list[bytes]:
        room = message.room
        noise = [*GARBAGE, wire(Released(room=room + 10**6, valid=True))]
        if isinstance(message, Release):
            return [*noise, wire(Released(room=room, valid=True))]
        flat = tuple(pointer for page in pointers for pointer in page)
        address = decode.forwarder.mooncake_address
        return [
            *noise,
            wire(Pages(room=room, mooncake_address=address, first_page=0, pointers=flat, sizes=sizes)),
            wire(Ended(room=room, end_page=4)),
        ]

    with scripted_de(answers) as endpoint:
        lane = Lane(prefill, endpoint, LONG_S)
        load = prefill.load(4)
        lane.pull(load, next(rooms))
        until_acknowledged(load)
        assert lane.missing_of(load) == []
        assert torch.equal(prefill.landed(load), bytes_of(decode.pool, pages))


def test_a_server_ignores_malformed_frames_and_goes_on(decode, prefill, server, lane):
    room, pages = next(rooms), decode.pages(PAGES)
    stranger = zmq.Context.instance().socket(zmq.DEALER)
    stranger.setsockopt(zmq.LINGER, 0)
    stranger.connect(server.endpoint)
    try:
        server.offer(room, first_page=0)
        for frame in GARBAGE:
            stranger.send(frame)
        stranger.send_multipart([b"two", b"frames"])
        # Answered after everything before it was read.
        stranger.send(wire(Release(room=10**9)))
        assert stranger.poll(WAIT_S * 1000)
        answer = peer_protocol.decode_to_lane(stranger.recv())
        assert answer == Released(room=10**9, valid=False)
        assert not stranger.poll(0), "garbage is not answered"
    finally:
        stranger.close()
    assert room in server._offers
    load = prefill.load(PAGES)
    server.publish(room, *decode.blocks(pages))
    lane.pull(load, room)
    until_acknowledged(load)
    assert torch.equal(prefill.landed(load), bytes_of(decode.pool, pages))
    nothing_is_left(server, lane, room)


def test_a_lane_to_an_address_that_is_none_still_hands_its_pages_on(prefill):
    lane = Lane(prefill, "not an address", SHORT_S)
    load = prefill.load(4)
    lane.pull(load, next(rooms))
    eventually(lambda: lane.missing_of(load) or not lane.lane.is_alive(), "its pages are fetched elsewhere")
    assert [missing[:2] for missing in lane.missing_of(load)] == [(0, 4)]


def test_a_pull_behind_a_long_read_is_not_taken_for_a_silent_peer(decode, prefill):
    """The lane's own reading time must not count against the DE."""
    first, second = next(rooms), next(rooms)
    pointers, sizes = decode.blocks(decode.pages(4))
    flat = tuple(pointer for page in pointers for pointer in page)

    def answers(message) -> list[bytes]:
        room = message.room
        if isinstance(message, Release):
            return [wire(Released(room=room, valid=True))]
        if room == second:
            threading.Event().wait(0.2)  # a slow answer, well within the lane's time-out
        address = decode.forwarder.mooncake_address
        return [
            wire(Pages(room=room, mooncake_address=address, first_page=0, pointers=flat, sizes=sizes)),
            wire(Ended(room=room, end_page=4)),
        ]

    with scripted_de(answers) as endpoint:
        timeout_s = 1.5
        lane = Lane(prefill, endpoint, timeout_s)
        load, behind = prefill.load(4), prefill.load(4)
        prefill.forwarder.gate.clear()
        lane.pull(load, first)
        eventually(lambda: prefill.forwarder.finished_reads == 1, "the first read is under way")
        lane.pull(behind, second)
        threading.Event().wait(timeout_s + 0.1)
        prefill.forwarder.gate.set()
        eventually(lambda: load._open_parts == behind._open_parts == 0, "both pulls end")
        assert lane.missing_of(load) == [] and load.prefix == 4
        assert lane.missing_of(behind) == [] and behind.prefix == 4


def test_a_room_that_is_opened_twice_keeps_nothing_of_its_first_life_pinned(decode, server):
    room, unpin = next(rooms), Calls()
    server.offer(room, first_page=0)
    server.publish(room, *decode.blocks(decode.pages(2)), unpin=unpin)
    server.offer(room, first_page=0)
    server.withdraw(room)
    assert unpin.count == 1


def test_a_callback_that_fails_does_not_keep_the_others_from_being_called(decode, server):
    room, unpin = next(rooms), Calls()

    def fail() -> None:
        raise ValueError("someone else's fault")

    server.offer(room, first_page=0)
    server.when_withdrawn(room, fail)
    server.publish(room, *decode.blocks(decode.pages(2)), unpin=unpin)
    with suppress(ValueError):
        server.withdraw(room)
    assert unpin.count == 1


# -- a DE that dies ------------------------------------------------------------------------------

DOOMED_DE = """
import sys, torch
from dualpath_sgl.lanes.forward import Forwarder
from dualpath_sgl.lanes.page_server import PageServer
count, block = map(int, sys.argv[1:3])
memory = torch.full((count * 2 * block,), 7, dtype=torch.uint8)
forwarder = Forwarder("127.0.0.1", "tcp", "", [memory])
server = PageServer("127.0.0.1", forwarder.mooncake_address, sys.argv[3], 60.0, 60.0)
server.start()
server.offer(int(sys.argv[4]), 0)
first = memory.data_ptr()
server.publish(int(sys.argv[4]), [
    (first + 2 * page * block, first + (2 * page + 1) * block) for page in range(count)
], (block, block))
print(server.endpoint, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("end_of_it", [signal.SIGKILL, signal.SIGSTOP])
def test_a_de_killed_or_hung_mid_pull_leaves_the_whole_range_to_another_source(prefill, end_of_it):
    room = next(rooms)
    block = prefill.page_bytes // 2
    process = subprocess.Popen(
        [sys.executable, "-c", DOOMED_DE, "3", str(block), FINGERPRINT, str(room)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        lane = Lane(prefill, process.stdout.readline().strip(), timeout_s=3.0)
        load = prefill.load(PAGES)
        lane.pull(load, room)
        eventually(lambda: load.lane_work[0].bytes == 3 * prefill.page_bytes, "what there is was read")
        process.send_signal(end_of_it)
        until_acknowledged(load)
        assert lane.missing_of(load) == [(0, PAGES, "peer silent")]
        assert load.prefix == 0 and room not in lane.lane._pulls
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
