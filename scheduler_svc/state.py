"""Cluster state: one message in, what to send and what happened out.

`Cluster.handle` is the whole scheduler without sockets and clocks: the server feeds it frames'
messages and the monotonic time, the simulator its own.  All of it is soft state; a restarted
scheduler relearns engines from one heartbeat interval.

Every check comes before the first change, so a refused message changes nothing.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from scheduler_svc.engines import EngineConflict, EngineState, EngineTable, RankKey
from scheduler_svc.intervals import pages
from scheduler_svc.placement import PlacementPolicy
from scheduler_svc.policies import PathPolicy, PathRequest, choose_path
from scheduler_svc.protocol import (
    PLAN_TIMEOUT_S,
    Done,
    Error,
    ErrorCode,
    Heartbeat,
    Outcome,
    Path,
    Place,
    Placement,
    Plan,
    Report,
    Request,
    Role,
    Status,
    StatusRequest,
    Wire,
)
from scheduler_svc.rooms import Room, RoomTable, Side

PLAN_DEADLINE_S = 0.8 * PLAN_TIMEOUT_S
"""A report older than this may have timed out at its sender by the time a plan arrives."""

MAX_FALLBACK_REASONS = 64
"""Distinct reasons counted by name; engines choose the text, so later ones count as `other`."""


@dataclass(frozen=True, slots=True)
class PlanDecided:
    plan: Plan
    traceparent: str | None
    """Of the PE's report, or else of the DE's."""
    first_report_s: float
    decided_s: float


@dataclass(frozen=True, slots=True)
class PlaceDecided:
    placement: Placement
    session_id: str | None
    traceparent: str | None


@dataclass(frozen=True, slots=True)
class FallbackSeen:
    """A room got a fallback reason it did not have yet."""

    reason: str


@dataclass(frozen=True, slots=True)
class RankDone:
    engine_id: str
    store_read_bytes: int
    forwarded_bytes: int
    duplicate_store_pages: int
    """Pages newly found to have been read by both sides."""


Event = PlanDecided | PlaceDecided | FallbackSeen | RankDone


class Result(NamedTuple):
    reply: Wire | None = None
    """To whoever sent the message."""
    pushes: tuple[tuple[RankKey, Plan], ...] = ()
    events: tuple[Event, ...] = ()


class Refused(Exception):
    """The message was not accepted and nothing changed."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class Cluster:
    """Engines, rooms and counters.  Single-threaded; `now_s` never goes back."""

    def __init__(
        self,
        path_policy: PathPolicy,
        placement_policy: PlacementPolicy,
        *,
        started_s: float,
        engines: EngineTable | None = None,
        rooms: RoomTable | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._path_policy = path_policy
        self._placement_policy = placement_policy
        self._started_s = started_s
        self._rng = rng or random.Random()
        self.engines = engines or EngineTable()
        self.rooms = rooms or RoomTable()
        self.paths: Counter[Path] = Counter()
        self.fallbacks: Counter[str] = Counter()
        self.duplicate_store_pages = 0
        self.errors = 0

    def handle(self, message: Request, now_s: float) -> Result:
        """Act on one message.  A refusal is an `Error` reply; this raises only on a fault of ours."""
        self.expire(now_s)
        try:
            match message:
                case Heartbeat():
                    return self._heartbeat(message, now_s)
                case Place():
                    return self._place(message)
                case Report():
                    return self._report(message, now_s)
                case Done():
                    return self._done(message, now_s)
                case StatusRequest():
                    return Result(self._status(now_s))
        except Refused as refused:
            self.errors += 1
            return Result(
                Error(
                    code=refused.code,
                    message=str(refused),
                    room=getattr(message, "room", None),
                    request_id=getattr(message, "request_id", None),
                )
            )

    def expire(self, now_s: float) -> list[RankKey]:
        """Forget what is too old; returns the ranks that went."""
        self.rooms.expire(now_s)
        return self.engines.expire(now_s)

    # Heartbeat and status

    def _heartbeat(self, message: Heartbeat, now_s: float) -> Result:
        try:
            self.engines.heartbeat(message.engine, message.load, now_s)
        except EngineConflict as conflict:
            raise Refused(ErrorCode.CONFLICT, str(conflict)) from None
        return Result()

    def _status(self, now_s: float) -> Status:
        return Status(
            policy=self._path_policy.name,
            uptime_s=max(0.0, now_s - self._started_s),
            engines=self.engines.status(now_s),
            rooms_open=self.rooms.open_count,
            rooms_closed=self.rooms.closed_count,
            paths=dict(self.paths),
            fallbacks=dict(self.fallbacks),
            duplicate_store_pages=self.duplicate_store_pages,
            errors=self.errors,
        )

    # Place

    def _place(self, message: Place) -> Result:
        leaders = {role: {engine.engine_id: engine for engine in self.engines.leaders(role)} for role in Role}
        for role, engines in leaders.items():
            if not engines:
                raise Refused(
                    ErrorCode.NO_ENGINE, f"no live {role} engine; start one or wait for its heartbeat"
                )
        pair = self._placement_policy.place(
            message.session_id, list(leaders[Role.PREFILL]), list(leaders[Role.DECODE])
        )
        placement = Placement(
            request_id=message.request_id,
            room=self._unused_room(),
            prefill=leaders[Role.PREFILL][pair.prefill_id],
            decode=leaders[Role.DECODE][pair.decode_id],
        )
        return Result(placement, events=(PlaceDecided(placement, message.session_id, message.traceparent),))

    def _unused_room(self) -> int:
        while True:
            room = self._rng.getrandbits(63)
            if self.rooms.get(room) is None:
                return room

    # Report and plan

    def _report(self, report: Report, now_s: float) -> Result:
        engine = self._known_engine(report)
        page_size = engine.any_rank.page_size
        most_pages = max(report.local_pages, report.hit_pages or 0)
        if most_pages * page_size > report.prompt_tokens:
            raise Refused(
                ErrorCode.MALFORMED,
                f"{most_pages} pages of {page_size} tokens exceed prompt_tokens {report.prompt_tokens}; "
                "count whole pages of the prompt only",
            )
        room = self.rooms.get(report.room)
        side = room.sides.get(report.role) if room else None
        if side is not None:
            self._check_engine(report, side)
            if side.report is not None:
                self._check_agrees(report, side.report)
        if room is not None and room.plan is not None:
            side.reported.add(report.rank)
            return Result(pushes=((RankKey(report.engine_id, report.rank), room.plan),))

        other_role = Role.DECODE if report.role is Role.PREFILL else Role.PREFILL
        other = room.sides.get(other_role) if room else None
        mine = side or Side(engine)
        first, first_s = (side.report, side.reported_s) if side and side.report else (report, now_s)
        decided = None
        if other is not None and other.report is not None:
            sides = {report.role: (mine, first, first_s), other_role: (other, other.report, other.reported_s)}
            decided = self._decide(sides, now_s)

        room = self.rooms.get_or_open(report.room, now_s)
        room.sides[report.role] = mine
        mine.report, mine.reported_s = first, first_s
        mine.reported.add(report.rank)
        if decided is None:
            return Result()
        return self._commit(room, *decided, now_s)

    def _known_engine(self, message: Report | Done) -> EngineState:
        engine = self.engines.get(message.engine_id)
        if engine is None or message.rank not in engine.ranks:
            raise Refused(
                ErrorCode.UNKNOWN_ENGINE,
                f"no recent heartbeat of engine {message.engine_id} rank {message.rank}; "
                "send one, then repeat this message",
            )
        if message.role is not engine.any_rank.role:
            raise Refused(
                ErrorCode.CONFLICT,
                f"role {message.role} contradicts the heartbeat of engine {message.engine_id}, "
                f"which says {engine.any_rank.role}",
            )
        return engine

    @staticmethod
    def _check_engine(message: Report | Done, side: Side) -> None:
        if message.engine_id != side.engine.engine_id:
            raise Refused(
                ErrorCode.CONFLICT,
                f"engine_id {message.engine_id}: room {message.room} has {message.role} engine "
                f"{side.engine.engine_id} already; use a room for one request only",
            )

    @staticmethod
    def _check_agrees(report: Report, first: Report) -> None:
        for name in ("prompt_tokens", "local_pages", "hit_pages"):
            said, known = getattr(report, name), getattr(first, name)
            if said != known:
                raise Refused(
                    ErrorCode.CONFLICT,
                    f"{name} {said} of rank {report.rank} contradicts {known} reported by rank {first.rank} "
                    f"of {first.engine_id} for room {report.room}; ranks must agree before they report",
                )

    def _decide(self, sides: dict[Role, tuple[Side, Report, float]], now_s: float) -> tuple[Plan, str | None]:
        """The plan, and why nothing may be forwarded if that is so.  Changes no state but the policy's."""
        (prefill_side, prefill, prefill_s), (decode_side, decode, decode_s) = (
            sides[Role.PREFILL],
            sides[Role.DECODE],
        )
        for side in (prefill_side, decode_side):
            if self.engines.get(side.engine.engine_id) is not side.engine:
                raise Refused(
                    ErrorCode.NO_ENGINE,
                    f"engine {side.engine.engine_id} expired after its report for room {prefill.room}; "
                    "go on with the prefill path",
                )
        fallback = _forward_obstacle(prefill_side.engine, decode_side.engine)
        if prefill_side.done or decode_side.done or now_s - min(prefill_s, decode_s) > PLAN_DEADLINE_S:
            fallback = fallback or (
                "plan_late",
                f"the first report is {now_s - min(prefill_s, decode_s):.3f} s old, its engine goes on alone",
            )
        if fallback:
            # Not even min(L_D, K): x = 0 says that nothing may come out of this DE.
            split_page, reason = 0, f"prefill path without forward: {fallback[1]}"
        else:
            split_page, reason = choose_path(
                self._path_policy,
                PathRequest(
                    prefill_local_pages=prefill.local_pages,
                    decode_local_pages=decode.local_pages,
                    hit_pages=prefill.hit_pages,
                    page_bytes=prefill_side.engine.page_bytes,
                    prefill=prefill_side.engine.load,
                    decode=decode_side.engine.load,
                ),
            )
        plan = Plan(
            room=prefill.room,
            path=path_of(prefill.local_pages, decode.local_pages, prefill.hit_pages, split_page),
            prefill_id=prefill.engine_id,
            decode_id=decode.engine_id,
            prefill_local_pages=prefill.local_pages,
            decode_local_pages=decode.local_pages,
            hit_pages=prefill.hit_pages,
            split_page=split_page,
            decode_endpoints=decode_side.engine.page_endpoints,
            policy=self._path_policy.name,
            reason=reason[:1024],
        )
        return plan, fallback[0] if fallback else None

    def _commit(self, room: Room, plan: Plan, fallback: str | None, now_s: float) -> Result:
        prefill, decode = room.sides[Role.PREFILL], room.sides[Role.DECODE]
        room.plan = plan
        self.paths[plan.path] += 1
        prefill.charge(max(0, plan.hit_pages - max(plan.split_page, plan.prefill_local_pages)))
        decode.charge(max(0, plan.split_page - plan.decode_local_pages))
        events: list[Event] = [
            PlanDecided(
                plan=plan,
                traceparent=prefill.report.traceparent or decode.report.traceparent,
                first_report_s=min(prefill.reported_s, decode.reported_s),
                decided_s=now_s,
            )
        ]
        if fallback and plan.path is not Path.NONE:
            events += self._count_fallback(room, fallback)
        pushes = tuple(
            (RankKey(side.engine.engine_id, rank), plan)
            for side in (prefill, decode)
            for rank in sorted(side.reported)
        )
        return Result(pushes=pushes, events=tuple(events))

    def _count_fallback(self, room: Room, reason: str) -> list[Event]:
        if reason not in self.fallbacks and len(self.fallbacks) >= MAX_FALLBACK_REASONS:
            reason = "other"
        if reason in room.fallbacks:
            return []
        room.fallbacks.add(reason)
        self.fallbacks[reason] += 1
        return [FallbackSeen(reason)]

    # Done

    def _done(self, done: Done, now_s: float) -> Result:
        engine = self._known_engine(done)
        room = self.rooms.get(done.room)
        side = room.sides.get(done.role) if room else None
        if side is not None:
            self._check_engine(done, side)
            if done.rank in side.done:
                if done == side.done[done.rank]:
                    return Result()
                raise Refused(
                    ErrorCode.CONFLICT,
                    f"rank {done.rank} of {done.engine_id} has said something else about room {done.room} "
                    "already; send Done once per room",
                )

        room = self.rooms.get_or_open(done.room, now_s)
        side = room.sides.setdefault(done.role, Side(engine))
        side.done[done.rank] = done
        side.release(done.rank)

        store_read_bytes = sum(lane.bytes for lane in done.lanes if lane.lane == "store")
        forwarded_bytes = sum(lane.bytes for lane in done.lanes if lane.lane == "peer")
        engine.totals.store_read_bytes += store_read_bytes
        engine.totals.forwarded_bytes += forwarded_bytes
        engine.totals.loaded_pages += done.loaded_pages
        duplicates = pages(room.read_twice())
        new_duplicates, room.duplicate_pages = duplicates - room.duplicate_pages, duplicates
        self.duplicate_store_pages += new_duplicates

        events: list[Event] = [RankDone(done.engine_id, store_read_bytes, forwarded_bytes, new_duplicates)]
        if done.outcome is Outcome.FALLBACK:
            events += self._count_fallback(room, done.fallback_reason or "unspecified")
        if room.closed_s is None and room.is_done:
            self.rooms.close(room, now_s)
        return Result(events=tuple(events))


def _forward_obstacle(prefill: EngineState, decode: EngineState) -> tuple[str, str] | None:
    """Why pages cannot move between two engines: a short name to count and a sentence, or None."""
    if prefill.any_rank.tp_size != decode.any_rank.tp_size:
        return "tp_size_differs", f"tp_size is {prefill.any_rank.tp_size} and {decode.any_rank.tp_size}"
    for engine in (prefill, decode):
        if not engine.is_complete:
            live = f"{len(engine.ranks)} of {engine.any_rank.tp_size} ranks"
            return "ranks_missing", f"{live} of {engine.engine_id} are live"
    if len(decode.page_endpoints) < decode.any_rank.tp_size:
        return "page_endpoints_missing", (
            f"{decode.engine_id} has {len(decode.page_endpoints)} page servers for "
            f"{decode.any_rank.tp_size} ranks"
        )
    for rank, state in prefill.ranks.items():
        ours, theirs = state.engine.fingerprint, decode.ranks[rank].engine.fingerprint
        if ours != theirs:
            return "fingerprint_differs", f"fingerprints of rank {rank}: {ours} and {theirs}"
    return None


def path_of(prefill_local_pages: int, decode_local_pages: int, hit_pages: int, split_page: int) -> Path:
    """The name of a split (`Path`); arguments are L_P, L_D, K and x."""
    if hit_pages <= prefill_local_pages:
        return Path.NONE
    if split_page <= decode_local_pages:
        return Path.PREFILL
    return Path.DECODE if split_page == hit_pages else Path.SPLIT
