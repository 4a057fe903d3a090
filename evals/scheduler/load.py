"""A load generator for the scheduler: engines and a router in one process, over real sockets.

It has to be faster than the scheduler on the other core, so it sends frames from templates and
finds what it needs of an answer with a regular expression; the scheduler sees exactly what real
peers send.  Engines share a few connections: a thousand sockets would make this process the limit.
"""

from __future__ import annotations

import itertools
import random
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import zmq

from scheduler_svc.ledger.engines import ENGINE_EXPIRY_S
from scheduler_svc.wire.protocol import (
    Done,
    ErrorCode,
    Heartbeat,
    LaneRecord,
    Outcome,
    Place,
    RankInfo,
    Report,
    Role,
    Workload,
    encode,
)

CONNECTIONS = 4
HOST_ENGINES = 8
PROMPT_TOKENS = 32_000
PAGE_TOKENS = 64
PAGE_BYTES = 2_560 * 1024
"""A 64-token Full Block of the paper's 660B model."""
HIT_PAGES = 490
LOCAL_PAGES = 20
RATE_BYTES_PER_S = 50e9
SESSIONS = 10_000
SEED = 1
STALL_S = 30.0
"""Without any answer for this long the run is given up."""

_AT_ONCE = int(zmq.DONTWAIT)

ROOM_MARK = 7_777_777_777_777_777_777
"""Stands for the room in templates."""

_PLACEMENT = re.compile(
    rb'"room":(\d+),"prefill":\{"engine_id":"([^"]+)".*?"decode":\{"engine_id":"([^"]+)"', re.DOTALL
)
_BUSY = f'"code":"{ErrorCode.BUSY}"'.encode()
_ROOM = re.compile(rb'"room":(\d+)')


class Stalled(RuntimeError):
    """The scheduler stopped answering, or refused a message."""


@dataclass(slots=True)
class _Request:
    prefill: bytes
    decode: bytes
    plans: int = 0
    reported_s: float = 0.0
    """Before the first report."""


@dataclass
class LoadGenerator:
    """`engines` live engines, half of each role.  Single-threaded; `close` it."""

    address: str
    engines: int
    heartbeat_s: float = 1.0
    context: zmq.Context = field(default_factory=zmq.Context)
    latencies_s: list[float] = field(default_factory=list)
    """From before a room's first report to each of its plans, as this process sees it: its own wait for a
    core, and for its turn to end, counts too."""
    places_s: list[float] = field(default_factory=list)
    """From when a placement was to be asked for until it was there, likewise.  With `run_at` that is the time
    at which the request came, however late this process was."""
    turns_s: list[float] = field(default_factory=list)
    """Between two looks at the sockets: how long an answer may have lain unread."""
    opened: int = 0
    planned: int = 0
    """Rooms both of whose plans have come."""
    refused: int = 0
    """Placements for which the scheduler had no time: a router places those by itself."""

    def __post_init__(self) -> None:
        self._sockets = [self._connect() for _ in range(CONNECTIONS)]
        self._router = self._connect()
        self._poller = zmq.Poller()
        for socket in (*self._sockets, self._router):
            self._poller.register(socket, zmq.POLLIN)
        names = [f"{role}-{index}" for index in range(self.engines // 2) for role in ("prefill", "decode")]
        self._names = [name.encode() for name in names]
        self._socket_of = {name: self._sockets[index % CONNECTIONS] for index, name in enumerate(self._names)}
        self._heartbeats = deque(
            (0.0, name, encode(_heartbeat(name.decode(), index))) for index, name in enumerate(self._names)
        )
        self._reports = {name: _template(_report(name.decode())) for name in self._names}
        self._dones = {name: _template(_done(name.decode())) for name in self._names}
        self._asked_s: deque[float] = deque()
        """When the placements that are not there yet were wanted; they come in order."""
        self._places = itertools.cycle(
            [
                encode(Place(request_id=f"r{i}", session_id=f"s{i}", prompt_tokens=PROMPT_TOKENS))
                for i in range(SESSIONS)
            ]
        )
        self._rooms: dict[bytes, _Request] = {}
        self._finish = True
        self._random = random.Random(SEED)
        self._heard_s = self._looked_s = time.monotonic()

    def _connect(self) -> zmq.Socket:
        socket = self.context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.connect(self.address)
        return socket

    def close(self) -> None:
        self.context.destroy(linger=0)

    def register(self) -> None:
        """Every engine's first heartbeat, and an answer that says all of them were handled."""
        self._beat(time.monotonic(), at_most=self.engines)
        for socket in self._sockets:
            socket.send(b'{"type":"status_request"}')
        for socket in self._sockets:
            if not socket.poll(int(STALL_S * 1000)):
                raise Stalled(f"no status within {STALL_S:g} s of {self.engines} heartbeats")
            socket.recv()

    def run_for(self, seconds: float, in_flight: int, progress: Callable[[int], None]) -> float:
        """Keep `in_flight` requests under way for a time; requests finished per second."""
        begun_s, begun = time.monotonic(), self.planned
        end_s = begun_s + seconds
        while (now_s := time.monotonic()) < end_s:
            self._open([now_s] * (in_flight - self._under_way))
            self._turn(now_s)
            progress(self.planned - begun)
        return (self.planned - begun) / (now_s - begun_s)

    def run_at(
        self, rate_per_s: float, seconds: float, progress: Callable[[int], None], at_once: int = 0
    ) -> None:
        """Requests come at random (Poisson), whatever the answers do; wait for the last one.

        `at_once` more come together each second.
        """
        next_s = burst_s = begun_s = time.monotonic()
        while (now_s := time.monotonic()) < begun_s + seconds:
            due: list[float] = []
            if burst_s <= now_s:
                due += [burst_s] * at_once
                burst_s += 1.0
            while next_s <= now_s:
                due.append(next_s)
                next_s += self._random.expovariate(rate_per_s)
            self._open(due)
            self._turn(now_s)
            progress(self.planned)
        self.drain()

    def fill(self, rooms: int, in_flight: int, progress: Callable[[int], None]) -> None:
        """Open and plan `rooms` rooms, and leave them open."""
        self._finish = False
        end = self.planned + rooms
        while self.planned < end:
            now_s = time.monotonic()
            self._open([now_s] * min(end - self.opened, in_flight - self._under_way))
            self._turn(now_s)
            progress(self.planned)

    def drain(self) -> None:
        """Wait until every request under way is finished."""
        while self._under_way:
            self._turn(time.monotonic())

    @property
    def _under_way(self) -> int:
        return self.opened - self.planned - self.refused

    def _open(self, wanted_s: list[float]) -> None:
        """One request for each time at which it was wanted."""
        for asked_s in wanted_s:
            self._asked_s.append(asked_s)
            self._router.send(next(self._places))
            self.opened += 1

    def _turn(self, now_s: float) -> None:
        self._beat(now_s, at_most=64)
        self.turns_s.append(time.monotonic() - self._looked_s)
        ready = self._poller.poll(1)
        self._looked_s = time.monotonic()
        if ready:
            self._heard_s = now_s
        elif self._under_way and now_s - self._heard_s > STALL_S:
            raise Stalled(f"{self._under_way} requests unanswered for {STALL_S:g} s")
        for socket, _ in ready:
            handle = self._placed if socket is self._router else self._planned
            for _ in range(64):
                try:
                    frame = socket.recv(_AT_ONCE)
                except zmq.Again:
                    break
                handle(frame)

    def _beat(self, now_s: float, at_most: int) -> None:
        for sent in range(at_most):
            if self._heartbeats[0][0] > now_s:
                return
            due_s, name, frame = self._heartbeats.popleft()
            if due_s and now_s - due_s > ENGINE_EXPIRY_S - self.heartbeat_s:
                raise Stalled("this process is too slow to keep its engines alive; use fewer engines")
            self._socket_of[name].send(frame)
            # First heartbeats come all at once; from then on they are spread over the interval.
            wait_s = self.heartbeat_s if due_s else self.heartbeat_s * sent / self.engines
            self._heartbeats.append((now_s + wait_s, name, frame))

    def _placed(self, frame: bytes) -> None:
        found = _PLACEMENT.search(frame)
        if found is None and _BUSY in frame:
            self._asked_s.popleft()
            self.refused += 1
            return
        if found is None:
            raise Stalled(f"instead of a placement came {frame[:300]!r}")
        room, prefill, decode = found.groups()
        now_s = time.monotonic()
        self.places_s.append(now_s - self._asked_s.popleft())
        self._rooms[room] = _Request(prefill, decode, reported_s=now_s)
        for name in (prefill, decode):
            head, tail = self._reports[name]
            self._socket_of[name].send(head + room + tail)

    def _planned(self, frame: bytes) -> None:
        found = _ROOM.search(frame)
        if found is None or not frame.startswith(b'{"type":"plan"'):
            raise Stalled(f"instead of a plan came {frame[:300]!r}")
        room = found.group(1)
        request = self._rooms[room]
        self.latencies_s.append(time.monotonic() - request.reported_s)
        request.plans += 1
        if request.plans < 2:
            return
        del self._rooms[room]
        if self._finish:
            for name in (request.prefill, request.decode):
                head, tail = self._dones[name]
                self._socket_of[name].send(head + room + tail)
        self.planned += 1


def _heartbeat(name: str, index: int) -> Heartbeat:
    role = Role(name.split("-")[0])
    return Heartbeat(
        engine=RankInfo(
            engine_id=name,
            role=role,
            url=f"http://host-{role}-{index // 2 // HOST_ENGINES}:{30_000 + index // 2 % HOST_ENGINES}",
            bootstrap_port=9000 if role is Role.PREFILL else None,
            page_endpoint=f"tcp://10.0.0.1:{1024 + index}" if role is Role.DECODE else None,
            fingerprint="0123456789abcdef",
            page_size=PAGE_TOKENS,
            page_bytes=PAGE_BYTES,
        ),
        load=Workload(
            sequences=index % 7,
            tokens=index % 7 * 1000,
            read_rate_bytes_per_s=RATE_BYTES_PER_S,
            host_free_pages=10_000,
        ),
    )


def _report(name: str) -> Report:
    role = Role(name.split("-")[0])
    return Report(
        room=ROOM_MARK,
        engine_id=name,
        role=role,
        prompt_tokens=PROMPT_TOKENS,
        local_pages=LOCAL_PAGES,
        hit_pages=HIT_PAGES if role is Role.PREFILL else None,
    )


def _done(name: str) -> Done:
    role = Role(name.split("-")[0])
    middle = (LOCAL_PAGES + HIT_PAGES) // 2
    store = (middle, HIT_PAGES) if role is Role.PREFILL else (LOCAL_PAGES, middle)
    lanes = [_lane("store", *store)]
    if role is Role.PREFILL:
        lanes.append(_lane("peer", LOCAL_PAGES, middle))
    return Done(
        room=ROOM_MARK,
        engine_id=name,
        role=role,
        outcome=Outcome.OK,
        loaded_pages=sum(lane.end_page - lane.first_page for lane in lanes),
        lanes=tuple(lanes),
    )


def _lane(name: Literal["store", "peer"], first: int, end: int) -> LaneRecord:
    moved = (end - first) * PAGE_BYTES
    return LaneRecord(
        lane=name, first_page=first, end_page=end, bytes=moved, queue_s=0.01, busy_s=moved / RATE_BYTES_PER_S
    )


def _template(message: Report | Done) -> tuple[bytes, bytes]:
    """The frame before and after its room."""
    head, tail = encode(message).split(str(ROOM_MARK).encode())
    return head, tail
