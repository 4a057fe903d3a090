"""Rooms: what PE and DE have said about one request, and the plan both got.

    open ── a report from each side ──> planned ── Done of every rank that reported ──> closed
      └────────── `ttl_s` after opening, or too many rooms ──> forgotten

A closed room lingers so that a late rank still gets its plan and a repeated Done is not counted
again.  A Done alone opens a room too: after a restart it is all the scheduler hears of it.

Rooms are bounded in number and in what they hold together, whatever the number of ranks and lanes:
closed ones go first, then the oldest open one.

There are up to a hundred thousand of them: their classes have slots, and the messages they keep
(plans and dones) are structs that take no more room than a tuple.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from scheduler_svc.ledger.engines import EngineState, RankKey, RankState
from scheduler_svc.ledger.intervals import Range, intersection, union
from scheduler_svc.wire.protocol import MAX_COUNT, MAX_RANKS, Done, Loaded, Plan, Role

MAX_ROOMS = 100_000
MAX_RECORDS = 2_000_000
"""Reports, charges, dones and their lanes in all rooms; each takes 100 to 300 bytes."""
ROOM_TTL_S = 300.0
"""Longer than any load takes; bounds how long a lost Done keeps its planned bytes."""
CLOSED_LINGER_S = 10.0


class Claim(NamedTuple):
    """What a side's first report said; every other rank's must agree."""

    prompt_tokens: int
    local_pages: int
    hit_pages: int | None
    prompt_hash: str | None = None


class Moved(NamedTuple):
    """What the lanes of one rank moved for a room."""

    store_read_bytes: int
    forwarded_bytes: int
    store_end_s: float | None
    """From its hand-over to the last store lane's end; None when nothing was read there."""

    @classmethod
    def by(cls, done: Done) -> Moved:
        read_bytes, forwarded_bytes, last_end_s = 0, 0, None
        for lane in done.lanes:
            if lane.lane == "peer":
                forwarded_bytes += lane.bytes
                continue
            read_bytes += lane.bytes
            end_s = lane.queue_s + lane.busy_s
            if last_end_s is None or end_s > last_end_s:
                last_end_s = end_s
        return cls(read_bytes, forwarded_bytes, last_end_s)


def store_ranges(done: Done) -> list[Range]:
    """Pages that a rank read from the store."""
    return [(lane.first_page, lane.end_page) for lane in done.lanes if lane.lane == "store"]


@dataclass(slots=True)
class Side:
    """One engine's part of a room."""

    engine: EngineState
    claim: Claim | None = None
    reported_s: float = 0.0
    traceparent: str | None = None
    reported: tuple[int, ...] = ()
    """Ranks, in the order of their reports."""
    done: dict[int, Done] = field(default_factory=dict)
    charges: dict[int, tuple[RankState, int]] = field(default_factory=dict)
    """Per rank: the state that was charged and the bytes still outstanding."""
    expected_end_s: float | None = None
    """Planned end of its storage read, from the plan on; None when nothing is known or to be read."""

    @property
    def is_done(self) -> bool:
        if not self.done:
            return False
        for rank in self.reported:  # noqa: SIM110  (a generator takes twice as long)
            if rank not in self.done:
                return False
        return True

    def charge(self, pages: int) -> None:
        """Put `pages` of every rank on its read queue.  Ranks that are done already read nothing more.

        Count the new `charges` with `RoomTable.grew`.
        """
        if pages:
            for rank, state in self.engine.ranks.items():
                if rank not in self.done:
                    size = pages * state.info.page_bytes
                    self.charges[rank] = (state, size)
                    state.planned_bytes += size
            self.engine.count_reads()

    def release(self, rank: int) -> None:
        charge = self.charges.pop(rank, None)
        if charge is not None:
            charge[0].planned_bytes -= charge[1]
            self.engine.count_reads()

    def release_all(self) -> None:
        for rank in list(self.charges):
            self.release(rank)


@dataclass(slots=True)
class Room:
    room: int
    opened_s: float
    tells: tuple[RankKey, ...] = ()
    """Ranks that want a `Loaded`."""
    closed_s: float = math.inf
    """Infinite while it is open."""
    sides: dict[Role, Side] = field(default_factory=dict)
    plan: Plan | None = None
    fallbacks: tuple[str, ...] = ()
    duplicate_pages: int = 0
    records: int = 0
    """`MAX_RECORDS` bounds their sum over all rooms."""

    def read_twice(self) -> list[Range]:
        """Pages that a PE rank and the same DE rank both read from the store."""
        if len(self.sides) < 2:
            return []
        prefill, decode = self.sides[Role.PREFILL].done, self.sides[Role.DECODE].done
        if not prefill or not decode:
            return []
        return union(self._common_ranges(prefill, decode))

    @staticmethod
    def _common_ranges(prefill: dict[int, Done], decode: dict[int, Done]) -> Iterator[Range]:
        for rank, done in prefill.items():
            if rank in decode:
                yield from intersection(store_ranges(done), store_ranges(decode[rank]))

    @property
    def is_closed(self) -> bool:
        return self.closed_s != math.inf

    @property
    def is_done(self) -> bool:
        return len(self.sides) == 2 and self.sides[Role.PREFILL].is_done and self.sides[Role.DECODE].is_done

    def loaded(self) -> Loaded:
        """Of a room that is done."""
        read = dict.fromkeys(Role, 0)
        forwarded = 0
        for role, side in self.sides.items():
            for done in side.done.values():
                moved = Moved.by(done)
                read[role] += moved.store_read_bytes
                forwarded += moved.forwarded_bytes
        return Loaded(
            room=self.room,
            path=self.plan.shown_path if self.plan else None,
            split_page=self.plan.split_page if self.plan else None,
            hit_pages=self.plan.hit_pages if self.plan else None,
            prefill_read_bytes=min(read[Role.PREFILL], MAX_COUNT),
            decode_read_bytes=min(read[Role.DECODE], MAX_COUNT),
            forwarded_bytes=min(forwarded, MAX_COUNT),
            fallbacks=self.fallbacks[:MAX_RANKS],
        )

    def release_all(self) -> None:
        for side in self.sides.values():
            side.release_all()


class RoomTable:
    """Open and lingering rooms, both bounded in number, in age and in what they hold."""

    def __init__(
        self,
        max_rooms: int = MAX_ROOMS,
        ttl_s: float = ROOM_TTL_S,
        linger_s: float = CLOSED_LINGER_S,
        max_records: int = MAX_RECORDS,
    ) -> None:
        self._max_rooms = max_rooms
        self._max_records = max_records
        self._records = 0
        self._ttl_s = ttl_s
        self._linger_s = linger_s
        self._open: OrderedDict[int, Room] = OrderedDict()
        """Oldest first."""
        self._closed: OrderedDict[int, Room] = OrderedDict()
        """Closed longest ago first."""
        self.closed_count = 0
        self.forgotten_count = 0
        """Open rooms given up for their age, or because there were too many."""

    @property
    def open_count(self) -> int:
        """Rooms that are open."""
        return len(self._open)

    def get(self, room: int) -> Room | None:
        found = self._open.get(room)
        return found if found is not None else self._closed.get(room)

    def get_or_open(self, room: int, now_s: float) -> Room:
        """Forgets the oldest open room when there are too many."""
        found = self.get(room)
        if found is None:
            if len(self._open) >= self._max_rooms:
                self._forget_oldest()
            found = self._open[room] = Room(room, opened_s=now_s)
        return found

    def grew(self, room: Room, records: int) -> None:
        """`room` holds so many more; others are forgotten when that is too much."""
        room.records += records
        self._records += records
        while self._records > self._max_records:
            if self._closed and next(iter(self._closed.values())) is not room:
                self._drop_oldest(self._closed)
            elif self._open and next(iter(self._open.values())) is not room:
                self._forget_oldest()
            else:
                break

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

    def _drop_oldest(self, rooms: OrderedDict[int, Room]) -> None:
        _, room = rooms.popitem(last=False)
        self._records -= room.records
        room.release_all()
