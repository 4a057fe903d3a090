"""Rooms: what PE and DE have said about one request, and the plan both got.

    open ── a report from each side ──> planned ── Done of every rank that reported ──> closed
      └────────── `ttl_s` after opening, or too many rooms ──> forgotten

A closed room lingers so that a late rank still gets its plan and a repeated Done is not counted
again.  A Done alone opens a room too: after a restart it is all the scheduler hears of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from scheduler_svc.engines import EngineState, RankState
from scheduler_svc.intervals import Range, intersection, union
from scheduler_svc.protocol import Done, Plan, Report, Role

MAX_ROOMS = 100_000
ROOM_TTL_S = 300.0
"""Longer than any load takes; bounds how long a lost Done keeps its planned bytes."""
CLOSED_LINGER_S = 10.0


@dataclass(slots=True)
class Side:
    """One engine's part of a room."""

    engine: EngineState
    report: Report | None = None
    """The first one; every other rank's must agree with it."""
    reported_s: float = 0.0
    reported: set[int] = field(default_factory=set)
    done: dict[int, Done] = field(default_factory=dict)
    charges: dict[int, tuple[RankState, int]] = field(default_factory=dict)
    """Per rank: the state that was charged and the bytes still outstanding."""

    @property
    def is_done(self) -> bool:
        return bool(self.done) and self.reported <= self.done.keys()

    def charge(self, pages: int) -> None:
        """Put `pages` of every rank on its read queue.  Ranks that are done already read nothing more."""
        for rank, state in self.engine.ranks.items():
            if pages and rank not in self.done:
                self.charges[rank] = (state, pages * state.engine.page_bytes)
                state.planned_bytes += self.charges[rank][1]

    def release(self, rank: int) -> None:
        if rank in self.charges:
            state, charged_bytes = self.charges.pop(rank)
            state.planned_bytes -= charged_bytes

    def release_all(self) -> None:
        for rank in list(self.charges):
            self.release(rank)

    def store_ranges(self, rank: int) -> Iterator[Range]:
        if rank in self.done:
            for lane in self.done[rank].lanes:
                if lane.lane == "store":
                    yield lane.first_page, lane.end_page


@dataclass(slots=True)
class Room:
    room: int
    opened_s: float
    closed_s: float | None = None
    sides: dict[Role, Side] = field(default_factory=dict)
    plan: Plan | None = None
    fallbacks: set[str] = field(default_factory=set)
    duplicate_pages: int = 0

    def read_twice(self) -> list[Range]:
        """Pages that a PE rank and the same DE rank both read from the store."""
        if len(self.sides) < 2:
            return []
        prefill, decode = self.sides[Role.PREFILL], self.sides[Role.DECODE]
        return union(
            page_range
            for rank in prefill.done.keys() & decode.done.keys()
            for page_range in intersection(prefill.store_ranges(rank), decode.store_ranges(rank))
        )

    @property
    def is_done(self) -> bool:
        return len(self.sides) == 2 and all(side.is_done for side in self.sides.values())

    def release_all(self) -> None:
        for side in self.sides.values():
            side.release_all()


class RoomTable:
    """Open and lingering rooms, both bounded in number and in age."""

    def __init__(
        self, max_rooms: int = MAX_ROOMS, ttl_s: float = ROOM_TTL_S, linger_s: float = CLOSED_LINGER_S
    ) -> None:
        self._max_rooms = max_rooms
        self._ttl_s = ttl_s
        self._linger_s = linger_s
        self._open: OrderedDict[int, Room] = OrderedDict()
        """Oldest first."""
        self._closed: OrderedDict[int, Room] = OrderedDict()
        """Closed longest ago first."""
        self.closed_count = 0
        self.forgotten_count = 0
        """Open rooms dropped for age or number."""

    @property
    def open_count(self) -> int:
        """Rooms that are open."""
        return len(self._open)

    def get(self, room: int) -> Room | None:
        return self._open.get(room) or self._closed.get(room)

    def get_or_open(self, room: int, now_s: float) -> Room:
        """Forgets the oldest open room when there are too many."""
        found = self.get(room)
        if found is None:
            if len(self._open) >= self._max_rooms:
                self._forget_oldest()
            found = self._open[room] = Room(room, opened_s=now_s)
        return found

    def close(self, room: Room, now_s: float) -> None:
        room.release_all()
        room.closed_s = now_s
        del self._open[room.room]
        self._closed[room.room] = room
        self.closed_count += 1
        if len(self._closed) > self._max_rooms:
            self._drop_oldest(self._closed)

    def expire(self, now_s: float) -> None:
        while self._open and now_s - next(iter(self._open.values())).opened_s > self._ttl_s:
            self._forget_oldest()
        while self._closed and now_s - next(iter(self._closed.values())).closed_s > self._linger_s:
            self._drop_oldest(self._closed)

    def _forget_oldest(self) -> None:
        self._drop_oldest(self._open)
        self.forgotten_count += 1

    @staticmethod
    def _drop_oldest(rooms: OrderedDict[int, Room]) -> None:
        _, room = rooms.popitem(last=False)
        room.release_all()
