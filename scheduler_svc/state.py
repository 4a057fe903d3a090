"""Cluster state: one message in, what to send and what happened out.

`Cluster.handle` is the whole scheduler without sockets and clocks: the server feeds it frames'
messages and the monotonic time, the simulator its own.  All of it is soft state; a restarted
scheduler relearns engines from one heartbeat interval.

Every check comes before the first change, so a refused message changes nothing.
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

from scheduler_svc.events import (
    Event,
    FallbackSeen,
    PlaceDecided,
    PlanDecided,
    RankDone,
    RankFaults,
    ReadEnded,
)
from scheduler_svc.helping import Helping
from scheduler_svc.ledger.engines import EngineConflict, EngineState, EngineTable, RankKey
from scheduler_svc.ledger.intervals import pages
from scheduler_svc.ledger.relays import RelayConflict, RelayTable
from scheduler_svc.ledger.rooms import MAX_ROOMS, Claim, Moved, Room, RoomTable, Side
from scheduler_svc.planning import (
    Decision,
    decide,
    forward_obstacle,
    late_obstacle,
    prompt_obstacle,
    relay_obstacle,
)
from scheduler_svc.policies.path_policies import PathPolicy
from scheduler_svc.policies.placement_policies import NoEngine, PlacementPolicy
from scheduler_svc.policies.placement_rules import expected_wait_s
from scheduler_svc.telemetry.faults import Faults
from scheduler_svc.wire.protocol import (
    LEADER_RANK,
    MAX_COUNT,
    OLDEST_VERSION,
    PROTOCOL_VERSION,
    Accepted,
    Done,
    EngineStatus,
    Error,
    ErrorCode,
    Heartbeat,
    Helpers,
    Loaded,
    Mode,
    Outcome,
    Path,
    Ping,
    Place,
    Placement,
    Plan,
    Pong,
    RankInfo,
    RelayHeartbeat,
    Report,
    Request,
    Role,
    Status,
    StatusRequest,
    Wire,
    Workload,
    common_version,
    printable,
)

MAX_FALLBACK_REASONS = 64
"""Distinct reasons counted by name; engines choose the text, so later ones count as `other`."""


EXPIRY_PERIOD_S = 0.05
"""Between two looks for what is too old, far below any of the ages looked for."""


class Result(NamedTuple):
    reply: Wire | None = None
    """To whoever sent the message."""
    pushes: tuple[tuple[RankKey, Plan], ...] = ()
    events: tuple[Event, ...] = ()
    loaded: Loaded | None = None
    """To the router that placed the request, if it asked."""
    told: tuple[tuple[RankKey, Loaded], ...] = ()
    """The same, to ranks that asked."""


NOTHING = Result()
PONG = Result(Pong())


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
        relays: RelayTable | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """`engines` and `relays`, when given, must be empty.  `rng` draws rooms: whoever knows a room may ask a decode
        engine for its pages, so nobody may be able to guess the next one."""
        self._path_policy = path_policy
        self._placement_policy = placement_policy
        self._started_s = started_s
        self._rng = rng or random.SystemRandom()
        self.engines = engines or EngineTable()
        self.faults = Faults()
        self.engines.watch(placement_policy, self.faults)
        self.rooms = rooms or RoomTable()
        self.relays = relays or RelayTable()
        self.helping = Helping(self.engines, self.relays, started_s)
        self.paths: Counter[Path] = Counter()
        self.fallbacks: Counter[str] = Counter()
        self.duplicate_store_pages = 0
        self.errors = 0
        self._next_expiry_s = started_s
        self._expired: list[RankKey] = []
        self._expired_relays: list[str] = []
        self._sender = b""
        self._asked: OrderedDict[int, bool] = OrderedDict()
        """Rooms of which a router wants to hear, oldest first."""
        self._handlers: dict[type[Request], Callable[[Any, float], Result]] = {
            Heartbeat: self._heartbeat,
            RelayHeartbeat: self._relay_heartbeat,
            Place: self._place,
            Report: self._report,
            Done: self._done,
            StatusRequest: self._status,
            Ping: lambda message, now_s: PONG,
        }

    def handle(self, message: Request, now_s: float, sender: bytes = b"") -> Result:
        """Act on one message of `sender` (a key or a connection).  A refusal is an `Error` reply; this raises
        only on a fault of ours."""
        self._sender = sender
        if now_s >= self._next_expiry_s:
            self._expire(now_s)
        try:
            return self._handlers[type(message)](message, now_s)
        except Refused as refused:
            self.errors += 1
            return Result(
                Error(
                    code=refused.code,
                    message=printable(str(refused)),
                    room=getattr(message, "room", None),
                    request_id=getattr(message, "request_id", None),
                )
            )

    def expire(self, now_s: float) -> list[RankKey]:
        """Forget what is too old; returns the ranks that went since the last call."""
        self._expire(now_s)
        expired, self._expired = self._expired, []
        return expired

    def expired_relays(self) -> list[str]:
        """Names of relays that `expire` and others have forgotten since the last call."""
        expired, self._expired_relays = self._expired_relays, []
        return expired

    def helpers_due(self, now_s: float) -> list[tuple[RankKey, Helpers]]:
        """What prefill engines are to be told now of who may help; ask for it after each burst of messages."""
        return self.helping.due(now_s)

    def _expire(self, now_s: float) -> None:
        self._next_expiry_s = now_s + EXPIRY_PERIOD_S
        try:
            self.rooms.expire(now_s)
        except Exception:
            self.faults.record("expiry of rooms", "rooms stay until the next look")
        try:
            gone = self.engines.expire(now_s)
            self._expired += gone
            for key in gone:
                self.helping.gone(key)
        except Exception:
            self.faults.record("expiry of engines", "engines stay until the next look")
        try:
            self._expired_relays += self.relays.expire(now_s)
        except Exception:
            self.faults.record("expiry of relays", "relays stay until the next look")

    # Heartbeat and status

    def _heartbeat(self, message: Heartbeat, now_s: float) -> Result:
        version = self._check_version(message)
        engine, load = message.engine, message.load
        faults = self._new_faults(engine, load)
        try:
            self.engines.heartbeat(
                engine, load, now_s, (message.version, message.oldest_version), self._sender
            )
        except EngineConflict as conflict:
            raise Refused(ErrorCode.CONFLICT, str(conflict)) from None
        if engine.role is Role.PREFILL and (engine.helped or engine.mode is Mode.RELAY):
            self.helping.heard(engine, message.hello)
        events = (RankFaults(engine.engine_id, faults),) if faults else ()
        return Result(Accepted(version) if message.hello else None, events=events)

    def _relay_heartbeat(self, message: RelayHeartbeat, now_s: float) -> Result:
        version = self._check_version(message)
        try:
            self.relays.heartbeat(message.relay, message.load, now_s, self._sender)
        except RelayConflict as conflict:
            raise Refused(ErrorCode.CONFLICT, str(conflict)) from None
        return Result(Accepted(version) if message.hello else None)

    def _new_faults(self, info: RankInfo, load: Workload) -> int:
        """Since the rank's last heartbeat; all of them when it is new here."""
        if not load.faults:
            return 0
        state = self.engines.get(info.engine_id)
        rank = None if state is None else state.ranks.get(info.rank)
        return load.faults if rank is None else max(0, load.faults - rank.load.faults)

    @staticmethod
    def _check_version(peer: Heartbeat | RelayHeartbeat | Place) -> int:
        """The newest version that both sides speak."""
        version = common_version(peer.version, peer.oldest_version, of=(PROTOCOL_VERSION, OLDEST_VERSION))
        if version is None:
            older = "this peer" if peer.version < PROTOCOL_VERSION else "the scheduler"
            raise Refused(
                ErrorCode.VERSION,
                f"this peer speaks protocol versions {peer.oldest_version} to {peer.version}, the scheduler "
                f"{OLDEST_VERSION} to {PROTOCOL_VERSION}; upgrade DualPath of {older}",
            )
        return version

    def _status(self, message: StatusRequest, now_s: float) -> Result:
        if message.relays:
            relays, next_page = self.relays.status(now_s, message.after)
            engines: tuple[EngineStatus, ...] = ()
        else:
            relays, next_page = (), self.engines.next_page(message.after)
            engines = self.engines.status(now_s, message.after)
        return Result(
            Status(
                policy=self._path_policy.name,
                uptime_s=max(0.0, now_s - self._started_s),
                engines=engines,
                rooms_open=self.rooms.open_count,
                rooms_closed=self.rooms.closed_count,
                rooms_forgotten=self.rooms.forgotten_count,
                paths=dict(self.paths),
                fallbacks=dict(self.fallbacks),
                duplicate_store_pages=min(self.duplicate_store_pages, MAX_COUNT),
                errors=self.errors,
                next=next_page,
                relays=relays,
                relay_count=len(self.relays),
            )
        )

    # Place

    def _place(self, message: Place, now_s: float) -> Result:
        self._check_version(message)
        try:
            choice = self._placement_policy.place(message.session_id, message.prompt_tokens)
        except NoEngine as nobody:
            raise Refused(ErrorCode.NO_ENGINE, str(nobody)) from None
        prefill, decode = choice.prefill, choice.decode
        placement = Placement(
            request_id=message.request_id,
            room=self._unused_room(),
            prefill=prefill.leader,
            decode=decode.leader,
        )
        event = PlaceDecided(
            placement,
            message.session_id,
            message.traceparent,
            self._placement_policy.name,
            expected_wait_s(prefill),
            expected_wait_s(decode),
            choice.inputs,
        )
        for engine, kept_pages in ((prefill, choice.prefill_kept_pages), (decode, choice.decode_kept_pages)):
            engine.place(placement.room, message.prompt_tokens, kept_pages, now_s)
        if message.tell_loaded:
            self._asked[placement.room] = True
            if len(self._asked) > MAX_ROOMS:
                self._asked.popitem(last=False)
        return Result(placement, events=(event,))

    def _unused_room(self) -> int:
        while True:
            room = self._rng.getrandbits(63)
            if self.rooms.get(room) is None:
                return room

    # Report and plan

    def _report(self, report: Report, now_s: float) -> Result:
        engine = self._known_engine(report)
        page_size = engine.page_size
        most_pages = report.hit_pages or report.local_pages  # K is never below L_P
        if most_pages * page_size > report.prompt_tokens:
            raise Refused(
                ErrorCode.MALFORMED,
                f"{most_pages} pages of {page_size} tokens exceed prompt_tokens {report.prompt_tokens}; "
                "count whole pages of the prompt only",
            )
        room = self.rooms.get(report.room)
        mine = room.sides.get(report.role) if room else None
        claim = Claim(report.prompt_tokens, report.local_pages, report.hit_pages, report.prompt_hash)
        if mine is not None:
            self._check_engine(report, mine)
            if mine.claim is not None:
                self._check_agrees(report, claim, mine.claim, by=mine.reported[0])
        if room is not None and room.plan is not None and mine is not None:
            self._count_report(room, mine, report, now_s)
            return Result(pushes=((RankKey(report.engine_id, report.rank), room.plan),))

        mine = mine or Side(engine)
        first = (claim, now_s) if mine.claim is None else (mine.claim, mine.reported_s)
        decision = self._decide(report, room, mine, first, now_s)

        room = self.rooms.get_or_open(report.room, now_s)
        room.sides[report.role] = mine
        if mine.claim is None:
            mine.claim, mine.reported_s, mine.traceparent = claim, now_s, report.traceparent
        self._count_report(room, mine, report, now_s)
        return NOTHING if decision is None else self._commit(room, decision, now_s)

    def _count_report(self, room: Room, side: Side, report: Report, now_s: float) -> None:
        if report.rank in side.reported:
            return
        self.rooms.grew(room, 1)
        side.reported += (report.rank,)
        if report.tell_loaded:
            room.tells += (RankKey(report.engine_id, report.rank),)
        if report.rank == LEADER_RANK:
            side.engine.arrive(report.room, report.prompt_tokens, report.local_pages, now_s)

    def _known_engine(self, message: Report | Done) -> EngineState:
        engine = self.engines.get(message.engine_id)
        if engine is None or message.rank not in engine.ranks:
            raise Refused(
                ErrorCode.UNKNOWN_ENGINE,
                f"no recent heartbeat of engine {message.engine_id} rank {message.rank}; "
                "send one, then repeat this message",
            )
        if message.role is not engine.role:
            raise Refused(
                ErrorCode.CONFLICT,
                f"role {message.role} contradicts the heartbeat of engine {message.engine_id}, "
                f"which says {engine.role}",
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
    def _check_agrees(report: Report, claim: Claim, first: Claim, *, by: int) -> None:
        """`first` is what rank `by` of the same engine has said."""
        if claim == first:
            return
        for name, said, known in zip(Claim._fields, claim, first, strict=True):
            says_nothing = name == "prompt_hash" and None in (said, known)
            if said != known and not says_nothing:
                raise Refused(
                    ErrorCode.CONFLICT,
                    f"{name} {said} of rank {report.rank} contradicts {known} reported by rank "
                    f"{by} of {report.engine_id} for room {report.room}; "
                    "ranks must agree before they report",
                )

    def _decide(
        self, report: Report, room: Room | None, mine: Side, first: tuple[Claim, float], now_s: float
    ) -> Decision | None:
        """The plan, once the other side has reported too.  Changes no state but the policy's."""
        other_role = Role.DECODE if report.role is Role.PREFILL else Role.PREFILL
        other = room.sides.get(other_role) if room else None
        if other is None or other.claim is None:
            return None
        for side in (mine, other):
            if self.engines.get(side.engine.engine_id) is not side.engine:
                raise Refused(
                    ErrorCode.NO_ENGINE,
                    f"engine {side.engine.engine_id} expired after its report for room {report.room}; "
                    "go on with the prefill path",
                )
        claim, reported_s = first
        ours, theirs = (mine.engine, claim), (other.engine, other.claim)
        prefill, decode = (ours, theirs) if report.role is Role.PREFILL else (theirs, ours)
        waited_s = now_s - min(reported_s, other.reported_s)
        obstacle = (
            relay_obstacle(prefill[0], decode[0], self.helping.in_words)
            or prompt_obstacle(prefill[1], decode[1])
            or forward_obstacle(prefill[0], decode[0])
            or late_obstacle(waited_s, bool(mine.done or other.done))
        )
        return decide(report.room, self._path_policy, prefill, decode, obstacle)

    def _commit(self, room: Room, decision: Decision, now_s: float) -> Result:
        plan, reason, lanes, obstacle = decision
        prefill, decode = room.sides[Role.PREFILL], room.sides[Role.DECODE]
        room.plan = plan
        self.paths[plan.path] += 1
        prefill.charge(max(0, plan.hit_pages - max(plan.split_page, plan.prefill_local_pages)))
        decode.charge(max(0, plan.split_page - plan.decode_local_pages))
        self.rooms.grew(room, len(prefill.charges) + len(decode.charges))
        prefill.expected_end_s, decode.expected_end_s = lanes.prefill_end_s, lanes.decode_end_s
        first, second = sorted((prefill, decode), key=lambda side: side.reported_s)
        fallback = obstacle.name if obstacle and obstacle.is_fallback and plan.path is not Path.NONE else None
        event = PlanDecided(
            plan,
            first.traceparent or second.traceparent,
            first.reported_s,
            now_s,
            reason,
            lanes,
            fallback,
        )
        events: tuple[Event, ...] = (event,)
        if fallback:
            events += self._count_fallback(room, fallback)
        pushes = []
        for side in (prefill, decode):
            engine_id = side.engine.engine_id
            pushes += [(RankKey(engine_id, rank), plan) for rank in sorted(side.reported)]
        return Result(pushes=tuple(pushes), events=events)

    def _count_fallback(self, room: Room, reason: str) -> tuple[Event, ...]:
        if reason not in self.fallbacks and len(self.fallbacks) >= MAX_FALLBACK_REASONS:
            reason = "other"
        if reason in room.fallbacks:
            return ()
        room.fallbacks += (reason,)
        self.fallbacks[reason] += 1
        return (FallbackSeen(reason),)

    # Done

    def _done(self, done: Done, now_s: float) -> Result:
        engine = self._known_engine(done)
        room = self.rooms.get(done.room)
        side = room.sides.get(done.role) if room else None
        if side is not None:
            self._check_engine(done, side)
            known = side.done.get(done.rank)
            if known is not None:
                if done == known:
                    return NOTHING
                raise Refused(
                    ErrorCode.CONFLICT,
                    f"rank {done.rank} of {done.engine_id} has said something else about room {done.room} "
                    "already; send Done once per room",
                )

        room = self.rooms.get_or_open(done.room, now_s)
        side = room.sides.get(done.role)
        if side is None:
            side = room.sides[done.role] = Side(engine)
        side.done[done.rank] = done
        self.rooms.grew(room, 1 + len(done.lanes))
        side.release(done.rank)
        self.engines.lowered(side.engine)

        store_read_bytes, forwarded_bytes, actual_s = Moved.by(done)
        totals = engine.totals
        totals.store_read_bytes += store_read_bytes
        totals.forwarded_bytes += forwarded_bytes
        totals.loaded_pages += done.loaded_pages
        duplicates = pages(room.read_twice())
        new_duplicates, room.duplicate_pages = duplicates - room.duplicate_pages, duplicates
        self.duplicate_store_pages += new_duplicates

        events: tuple[Event, ...] = (
            RankDone(done.engine_id, store_read_bytes, forwarded_bytes, new_duplicates),
        )
        if done.outcome is Outcome.OK and actual_s is not None and side.expected_end_s is not None:
            events += (
                ReadEnded(
                    done.room, done.role, done.engine_id, side.traceparent, side.expected_end_s, actual_s
                ),
            )
        if done.outcome is Outcome.FALLBACK:
            events += self._count_fallback(room, done.fallback_reason or "unspecified")
        if room.is_closed or not room.is_done:
            return Result(events=events)
        self.rooms.close(room, now_s)
        asked = self._asked.pop(room.room, False)
        if not (asked or room.tells):
            return Result(events=events)
        loaded = room.loaded()
        told = tuple((key, loaded) for key in room.tells)
        return Result(events=events, loaded=loaded if asked else None, told=told)
