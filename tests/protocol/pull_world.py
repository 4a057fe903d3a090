"""One PE pulls pages of two rooms from two DEs: `PeerLane`, `PageLoad` and `PageServer` as they are.

Played: ZeroMQ, Mooncake, the host pools' bytes, the store (which brings all it is asked for), and what a DE does
with its pages: as soon as one is unpinned, other bytes lie there.
"""

from __future__ import annotations

import sys
import threading
import types
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from queue import SimpleQueue

import pytest
import torch
from played_network import AtOnce, PlayedZmq, Quiet, no_faults
from played_time import CLOCK, Letters

from dualpath_sgl.lanes import page_load, page_server, peer_lane
from dualpath_sgl.lanes.forward import StillWriting
from dualpath_sgl.lanes.open_loads import OpenLoads
from dualpath_sgl.lanes.page_load import PageLoad
from dualpath_sgl.lanes.page_server import PageServer
from dualpath_sgl.lanes.peer_lane import PeerLane
from dualpath_sgl.threads import faults

APART = 10
"""Between two pages' addresses: runs of them are not merged."""
PATIENCE_S, LEASE_S = 3.0, 5.0
MOMENT_S = 1.1
"""Between two looks of somebody who waits."""
LONG_S = 6.0
"""Too long for everybody who waits, and for every lease."""
GONE = "other bytes"
SETTLING_STEPS = 60


@dataclass
class PrefetchAck:
    """SGLang's, without the SGLang around it."""

    rid: str
    operation: object
    completed_tokens: int = 0
    completed_req: bool = False


def play(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for all that the world plays."""

    class Numbers:
        @staticmethod
        def uuid4() -> types.SimpleNamespace:
            return types.SimpleNamespace(bytes=b"")

    for module in (page_server, peer_lane):
        monkeypatch.setattr(module, "zmq", PlayedZmq())
        monkeypatch.setattr(module, "Mailbox", Letters)
        monkeypatch.setattr(module, "LimitedLog", Quiet)
        monkeypatch.setattr(module, "notice_dead_peers", lambda socket: None)
    for module in (page_server, peer_lane, page_load):
        monkeypatch.setattr(module, "time", CLOCK)
    monkeypatch.setattr(page_server, "Connections", Quiet)
    monkeypatch.setattr(page_server, "fd_of", lambda frame: 0)
    monkeypatch.setattr(peer_lane, "threading", types.SimpleNamespace(Lock=threading.Lock, Thread=AtOnce))
    monkeypatch.setattr(peer_lane, "uuid", Numbers)
    monkeypatch.setattr(peer_lane, "logger", Quiet())
    monkeypatch.setattr(faults, "record", no_faults)
    of_sglang = types.SimpleNamespace(PrefetchAck=PrefetchAck)
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.cache_controller", of_sglang)


class Hanging(StillWriting):
    """Blocks that may still come: `(address here, address there)`."""

    def __init__(self, blocks: list[tuple[int, int]]) -> None:
        Exception.__init__(self)
        self.blocks = blocks

    def over(self) -> bool:
        return not self.blocks


@dataclass(frozen=True)
class Room:
    number: int
    engine: int
    """Which DE it is placed on."""


@dataclass(frozen=True)
class Plot:
    rooms: tuple[Room, ...]
    faults: tuple[str, ...] = ()
    """Kinds that may happen: lose, again, late, cut, crash, restart, abort, cancel, short, fail, hang."""
    most_faults: int = 0
    longs: int = 0
    """How often time passes, so that whoever waits has waited too long."""
    pages: int = 1
    """Of each room."""


class Bytes:
    """Content by address; of an engine that has died no transfer brings anything."""

    def __init__(self) -> None:
        self.of: dict[int, object] = {}


class Decode:
    """A DE process."""

    def __init__(self, number: int, life: int) -> None:
        self.life = life
        self.address = f"de-{number}-{life}"
        self.memory = Bytes()
        self.server = PageServer("127.0.0.1", self.address, "layout", LEASE_S, LEASE_S)
        self.pinned: set[int] = set()
        self.published: dict[int, int] = {}
        """Pages by room that was offered."""
        self.request: dict[int, int] = {}
        """By the same."""

    def offer(self, index: int, room: int) -> None:
        """For request `index`."""
        self.request[room] = index
        self.published[room] = 0
        self.server.offer(room, 0, f"prompt-{index}")

    def publish(self, room: int) -> None:
        """Its next page is whole and pinned, at an address that no page had before."""
        index = self.request[room]
        page = self.published[room]
        self.published[room] += 1
        address = (100 + 10 * index + page) * APART
        self.memory.of[address] = index, page
        self.pinned.add(address)
        self.server.publish(room, [(address,)], (1,), unpin=lambda: self.unpin(address))

    def unpin(self, address: int) -> None:
        self.pinned.discard(address)
        self.memory.of[address] = GONE


class HostPool:
    """Of the PE."""

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        return [index * APART for index in indices.tolist()], [1] * len(indices)

    def layout_lease(self) -> nullcontext[None]:
        return nullcontext()


class Controller:
    page_size = 1

    def __init__(self) -> None:
        self.storage_host_pool = self.mem_pool_host = HostPool()
        self.prefetch_sync_queue: SimpleQueue = SimpleQueue()
        self.freed: list[int] = []

    def append_host_mem_release(self, indices: torch.Tensor) -> None:
        self.freed += indices.tolist()

    def _page_transfer_sidecar(self, *_anything: object) -> None:
        pass


class Operation:
    pool_transfers = None
    deadline_expired = False

    def __init__(self, index: int, pages: int, first_page: int = 0) -> None:
        self.index = index
        self.storage_start = first_page
        self.request_id = str(index)
        self.hash_value = [f"{index}/{page}" for page in range(pages)]
        self.host_indices = torch.arange(index * pages, (index + 1) * pages)
        self.stopped = False

    def is_terminated(self) -> bool:
        return self.stopped


class Prefill:
    """The PE process: its memory, its loads, and a lane to each DE."""

    def __init__(self, world: PullWorld) -> None:
        self._world = world
        self.memory = Bytes()
        self.open_loads = OpenLoads()
        self.loads: list[tuple[int, PageLoad]] = []
        self.hung: list[tuple[Hanging, Decode]] = []
        self.lanes = [
            PeerLane(f"tcp://127.0.0.1:{number + 1}", self, "layout", PATIENCE_S, self.from_store)
            for number in range(2)
        ]

    def load(self, index: int, room: Room) -> None:
        pages = self._world.plot.pages
        load = PageLoad(
            Controller(),
            Operation(index, pages),
            open_loads=self.open_loads,
            page_bytes=peer_lane.MOST_WAVE_BYTES,  # a page a wave
        )
        self.loads.append((index, load))
        assert self.lanes[room.engine].submit(load, room.number, pages, f"prompt-{index}")
        load.close_part()

    # What the lanes are given

    def answers(self, _address: str) -> bool:
        return True

    def read(self, address: str, local: list[int], remote: list[int], _sizes: list[int], _s: float) -> bool:
        decode = self._world.alive(address)
        blocks = list(zip(local, remote, strict=True))
        outcome, self._world.outcome = self._world.outcome, ""
        if outcome == "hang" and decode is not None:
            hanging = Hanging(blocks)
            self.hung.append((hanging, decode))
            raise hanging from TimeoutError()
        if outcome == "fail" or decode is None:
            return False
        for here, there in blocks:
            self.memory.of[here] = decode.memory.of.get(there)
        return True

    def from_store(self, load: PageLoad, first: int, end: int, _reason: str) -> None:
        """Another source brings pages `[first, end)`, at once."""
        load.open_part("store", first, end)
        for page, place in enumerate(load.host_indices(first, end).tolist(), first):
            self.memory.of[place * APART] = load.operation.index, page
        load.land(first, end)
        load.close_part()


class PullWorld:
    unseen = frozenset({"lane_work", "work", "_on_missing", "_world", "queued_ns", "told_s", "on_prefix"})
    opaque = (type(threading.Lock()), OpenLoads, Quiet, HostPool, SimpleQueue, threading.Event)

    def __init__(self, plot: Plot) -> None:
        CLOCK.reset()
        self.plot = plot
        self.faults_left = plot.most_faults
        self.longs = plot.longs
        self.outcome = ""
        self.decodes = [Decode(number, 0) for number in range(2)]
        self.prefill = Prefill(self)
        self.begun: list[bool] = [False] * len(plot.rooms)
        self.offered: list[bool] = [False] * len(plot.rooms)
        self.used = {room.engine for room in plot.rooms}

    def roots(self) -> object:
        lanes = [_lane_state(lane) for lane in self.prefill.lanes]
        servers = [
            (
                _server_state(decode.server),
                decode.memory.of,
                decode.published,
                decode.request,
                sorted(decode.pinned),
                decode.life,
            )
            for decode in self.decodes
        ]
        loads = [_load_state(load) for _, load in self.prefill.loads]
        mine = (CLOCK.now_s, self.faults_left, self.longs, self.begun, self.offered)
        hung = [(hanging.blocks, decode.life) for hanging, decode in self.prefill.hung]
        return [mine, lanes, servers, loads, hung, self.prefill.memory.of]

    # -- what can happen

    def alive(self, address: str) -> Decode | None:
        return next((decode for decode in self.decodes if decode.address == address), None)

    def actions(self) -> Iterator[str]:
        for index, room in enumerate(self.plot.rooms):
            # A number that comes again means a request after the first one's end on both sides.
            if not self.begun[index]:
                yield f"load {index}"
            if not self.offered[index]:
                yield f"offer {index}"
            published = self.decodes[room.engine].published.get(room.number)
            if self.offered[index] and published is not None and published < self.plot.pages:
                yield f"publish {index}"
        for engine in sorted(self.used):
            lane, server = self.prefill.lanes[engine], self.decodes[engine].server
            # A turn without anything to do changes nothing.
            if not lane._mailbox.empty or lane._turns or lane._unfinished or CLOCK.moved:
                yield f"turn lane {engine}"
            if not server._wake.empty or CLOCK.moved:
                yield f"turn server {engine}"
            for link in self.links(engine):
                if link[0]:
                    yield f"message {engine} {link[1]}"
        if self.longs:
            yield "long"
        yield from (
            f"writes {index}" for index, (hanging, _) in enumerate(self.prefill.hung) if hanging.blocks
        )
        if self.faults_left:
            yield from self.possible_faults()

    def possible_faults(self) -> Iterator[str]:
        kinds = self.plot.faults
        for engine in sorted(self.used):
            for link, way in self.links(engine):
                for kind in ("lose", "again", "late"):
                    if kind in kinds and len(link) > (kind == "late"):
                        yield f"{kind} {engine} {way}"
            lane = self.prefill.lanes[engine]
            for kind in ("fail", "hang"):
                if kind in kinds and lane._turns:
                    yield f"{kind} {engine}"
            if "cut" in kinds and any(link for link, _ in self.links(engine)):
                yield f"cut {engine}"
            if "crash" in kinds:
                yield f"crash {engine}"
        if "restart" in kinds and self.prefill.loads:
            yield "restart"
        for index, room in enumerate(self.plot.rooms):
            decode = self.decodes[room.engine]
            if room.number in decode.published and decode.server.offers(room.number):
                yield from (f"{kind} {index}" for kind in ("abort", "short") if kind in kinds)
        if "cancel" in kinds:
            for index, (_, load) in enumerate(self.prefill.loads):
                if not load.cancelled and not load._acknowledged:
                    yield f"cancel {index}"

    def links(self, engine: int) -> list[tuple[deque[list[bytes]], str]]:
        lane, server = self.prefill.lanes[engine], self.decodes[engine].server
        return [(lane._socket.sent, "to"), (server._socket.sent, "from")]

    def do(self, action: str) -> None:
        what, *arguments = action.split()
        if what in self.plot.faults:
            self.faults_left -= 1
        getattr(self, what)(*arguments)

    def load(self, index: str) -> None:
        self.begun[int(index)] = True
        self.prefill.load(int(index), self.plot.rooms[int(index)])

    def offer(self, index: str) -> None:
        room = self.plot.rooms[int(index)]
        self.offered[int(index)] = True
        self.decodes[room.engine].offer(int(index), room.number)

    def publish(self, index: str) -> None:
        room = self.plot.rooms[int(index)]
        self.decodes[room.engine].publish(room.number)

    def turn(self, who: str, engine: str) -> None:
        if who == "lane":
            self.prefill.lanes[int(engine)]._turn()
        else:
            self.decodes[int(engine)].server._turn()

    def message(self, engine: str, way: str) -> None:
        """The next one arrives, and who hears it takes a turn."""
        lane, server = self.prefill.lanes[int(engine)], self.decodes[int(engine)].server
        if way == "to":
            server._socket.inbox.append([b"lane", *lane._socket.sent.popleft()])
            server._turn()
        else:
            _, *parts = server._socket.sent.popleft()
            lane._socket.inbox.append(parts)
            lane._turn()

    def long(self) -> None:
        self.longs -= 1
        CLOCK.now_s += LONG_S

    def writes(self, index: str) -> None:
        """A block of a read that was given up comes after all."""
        hanging, decode = self.prefill.hung[int(index)]
        here, there = hanging.blocks.pop(0)
        if decode in self.decodes:
            self.prefill.memory.of[here] = decode.memory.of.get(there)

    # -- what can go wrong

    def lose(self, engine: str, way: str) -> None:
        {way: link for link, way in self.links(int(engine))}[way].popleft()

    def again(self, engine: str, way: str) -> None:
        link = {way: link for link, way in self.links(int(engine))}[way]
        link.append(link[0])

    def late(self, engine: str, way: str) -> None:
        link = {way: link for link, way in self.links(int(engine))}[way]
        link.append(link.popleft())

    def cut(self, engine: str) -> None:
        """The connection breaks, with all that is under way."""
        for link, _ in self.links(int(engine)):
            link.clear()

    def fail(self, engine: str) -> None:
        self.outcome = "fail"
        self.prefill.lanes[int(engine)]._turn()
        self.outcome = ""

    def hang(self, engine: str) -> None:
        self.outcome = "hang"
        self.prefill.lanes[int(engine)]._turn()
        self.outcome = ""

    def crash(self, engine: str) -> None:
        """The DE dies and comes back at the same address, knowing nothing."""
        self.cut(engine)
        self.decodes[int(engine)] = Decode(int(engine), self.decodes[int(engine)].life + 1)

    def restart(self) -> None:
        """The PE dies and comes back; its requests are lost."""
        for engine in (0, 1):
            self.cut(str(engine))
        self.prefill = Prefill(self)

    def abort(self, index: str) -> None:
        """The DE wants its memory back."""
        room = self.plot.rooms[int(index)]
        decode = self.decodes[room.engine]
        decode.published.pop(room.number)
        decode.server.withdraw(room.number)

    def short(self, index: str) -> None:
        """The DE's read brings nothing more."""
        room = self.plot.rooms[int(index)]
        decode = self.decodes[room.engine]
        decode.published.pop(room.number)
        decode.server.end(room.number, "storage read fell short")

    def cancel(self, index: str) -> None:
        self.prefill.loads[int(index)][1].operation.stopped = True

    # -- what must hold

    def check(self) -> None:
        for index, load in self.prefill.loads:
            for page, place in enumerate(load._host_indices.tolist()):
                if load._landed[page]:
                    there = self.prefill.memory.of.get(place * APART)
                    assert there == (index, page), f"page {page} of request {index} landed with {there}"
            assert load._open_parts >= 0

    def _at_rest(self) -> bool:
        servers = (decode.server for decode in self.decodes)
        lanes = self.prefill.lanes
        return (
            not any(server._offers or server._pullers or server._socket.sent for server in servers)
            and not any(lane._pulls or lane._unfinished or lane._socket.sent for lane in lanes)
            and all(lane._mailbox.empty for lane in lanes)
        )

    def settle(self) -> None:
        for step in range(SETTLING_STEPS):
            if step % 4 == 0 and self._at_rest():
                break
            for engine in (0, 1):
                for link, way in self.links(engine):
                    while link:
                        self.message(str(engine), way)
                self.decodes[engine].server._turn()
                self.prefill.lanes[engine]._turn()
            for room in self.plot.rooms:
                decode, pages = self.decodes[room.engine], self.plot.pages
                if decode.published.get(room.number, pages) < pages and decode.server.offers(room.number):
                    decode.publish(room.number)
            for hanging, _ in self.prefill.hung:
                hanging.blocks.clear()
            if step % 4 == 3:
                CLOCK.now_s += MOMENT_S
                self.check()
        self.check()
        for decode in self.decodes:
            assert not decode.server.offered_rooms, "a room stays offered"
            assert not decode.pinned, "pages stay pinned"
            assert not decode.server._pullers, "a pull is not answered"
        for lane in self.prefill.lanes:
            assert not lane._pulls, "a pull does not end"
            assert lane.quarantined_pages == 0, "pages are kept back for ever"
        for index, load in self.prefill.loads:
            words = []
            while not load.controller.prefetch_sync_queue.empty():
                words.append(load.controller.prefetch_sync_queue.get())
            assert sum(bool(word.completed_req) for word in words) == 1, "SGLang has its pages back once"
            assert load.cancelled or load.prefix >= load.pages - len(load.controller.freed), (
                f"request {index}: too few"
            )
        assert not len(self.prefill.open_loads), "a load stays open"


def _lane_state(lane: PeerLane) -> object:
    names = ("_pulls", "_turns", "_unanswered", "_known", "_greeting", "_unfinished", "_mailbox")
    return [getattr(lane, name) for name in names], list(lane._socket.inbox), list(lane._socket.sent)


def _server_state(server: PageServer) -> object:
    names = ("_offers", "_withdrawn", "_pullers", "_wake")
    looks = CLOCK.now_s >= server._look_s
    return (
        [getattr(server, name) for name in names],
        looks,
        list(server._socket.inbox),
        list(server._socket.sent),
    )


def _load_state(load: PageLoad) -> object:
    return (
        load.prefix, bytes(load._landed), bytes(load._withheld), load._open_parts, load.cancelled,
        load._acknowledged, load._given_back,
    )  # fmt: skip
