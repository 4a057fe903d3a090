"""Engines the scheduler knows: each rank as its last heartbeat described it, plus what is planned.

An engine is live while at least one rank's heartbeat is younger than `ENGINE_EXPIRY_S`, and can
be given requests while all of its ranks are.  A rank that expires takes its planned bytes with
it: rooms keep a reference to the `RankState` they charged, so a later release cannot touch the
state of a restarted engine.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple, Protocol

from scheduler_svc.ledger.kept_pages import KeptPages
from scheduler_svc.ledger.placed_work import PlacedWork
from scheduler_svc.ledger.token_rate import TokenRate
from scheduler_svc.telemetry.faults import Faults
from scheduler_svc.wire.protocol import (
    LEADER_RANK,
    MAX_COUNT,
    MAX_RATE,
    EngineStatus,
    Mode,
    RankInfo,
    Resident,
    Role,
    Workload,
)

ENGINE_EXPIRY_S = 5.0
"""Five missed heartbeats."""

MAX_ENGINES = 16_384
MAX_RANKS = 65_536
"""Most ranks of all engines together."""
CANDIDATES = 64
"""Ranks looked at when one has to make room: those that heartbeat longest ago."""

STATUS_ENGINES = 48
"""In one page of a status.  However long their names are, it fits into a message (a test sees to it)."""


class EngineConflict(ValueError):
    """A heartbeat contradicts a live rank of the same engine, or there is no room for it."""


class RankKey(NamedTuple):
    engine_id: str
    rank: int


@dataclass(slots=True)
class RankState:
    info: RankInfo
    load: Workload
    heartbeat_s: float
    versions: tuple[int, int] = (1, 1)
    """Newest and oldest protocol version that it speaks."""
    sender: bytes = b""
    """Who heartbeats for it: a key, or a connection."""
    planned_bytes: int = 0
    """Storage reads planned for this rank and not yet reported done."""


@dataclass(slots=True)
class Totals:
    """What an engine has done since the scheduler first saw it."""

    store_read_bytes: int = 0
    forwarded_bytes: int = 0
    loaded_pages: int = 0


class Shape(NamedTuple):
    """What does not change with load; equal shapes can exchange pages rank by rank."""

    tp_size: int
    fingerprints: tuple[tuple[int, str], ...]
    """Rank and layout fingerprint of every live rank, in rank order."""

    @property
    def is_complete(self) -> bool:
        return len(self.fingerprints) == self.tp_size


NO_SHAPE = Shape(1, ())


@dataclass(slots=True, eq=False)
class EngineState:
    """One engine between its first heartbeat and its expiry.

    What follows from `ranks` and `placed` is asked for many times a request and changed a few times:
    it is kept by `reshape`, `count_work` and `count_reads`.
    """

    engine_id: str
    role: Role
    totals: Totals
    serial: int = 0
    """Grows from engine to engine."""
    is_announced: bool = False
    """The watcher knows it."""
    ranks: dict[int, RankState] = field(default_factory=dict)
    placed: PlacedWork = field(default_factory=PlacedWork)
    token_rate: TokenRate = field(default_factory=TokenRate, repr=False)
    kept: KeptPages = field(default_factory=KeptPages, repr=False)
    tokens: int = 0
    """Prompt tokens it has to do (tok_e), those just placed included."""
    sequences: int = 0
    """Requests it has (seq_e), likewise."""
    free_device_tokens: int | None = None
    """Tokens of KV its fullest rank has room for, those just placed taken off; None when it never said."""
    tokens_per_s: float = 0.0
    """0 while unknown, and always on a DE: it works on all its requests at once, so what it has over
    what it retires would be how long requests stay there, not how long a new one waits."""
    read_queue_bytes: int = 0
    """Storage reads of all ranks (read_q), planned ones included."""
    read_rate_bytes_per_s: float = 0.0
    """Over all ranks; 0 while unknown."""
    reported_tokens: int = 0
    reported_sequences: int = 0
    """As the leader rank's last heartbeat says."""
    reported_free_tokens: int | None = None
    """Least of all ranks' last heartbeats; None until one of them was not zero."""
    shape: Shape = NO_SHAPE
    versions: tuple[int, int] = (1, 1)
    """Newest and oldest protocol version that all live ranks speak."""
    page_size: int = 0
    """Tokens."""
    page_bytes: int = 0
    """Bytes of one page over all ranks."""
    page_endpoints: tuple[str, ...] = ()
    """Page servers in rank order; shorter than tp_size when a rank has none."""
    mode: Mode = Mode.DECODE_SIDE
    is_helped: bool = False
    """A PE whose ranks want to know who may help."""

    def reshape(self) -> None:
        """To be called when a rank came, went or described itself anew."""
        ranks = sorted(self.ranks.items())
        self.shape = Shape(
            ranks[0][1].info.tp_size, tuple((rank, state.info.fingerprint) for rank, state in ranks)
        )
        self.versions = (
            min(state.versions[0] for _, state in ranks),
            max(state.versions[1] for _, state in ranks),
        )
        self.mode = ranks[0][1].info.mode
        self.is_helped = self.role is Role.PREFILL and any(
            state.info.helped or state.info.mode is Mode.RELAY for _, state in ranks
        )
        self.page_size = ranks[0][1].info.page_size
        self.page_bytes = sum(state.info.page_bytes for _, state in ranks)
        endpoints = (state.info.page_endpoint for _, state in ranks)
        self.page_endpoints = tuple(endpoint for endpoint in endpoints if endpoint is not None)

    def place(self, room: int, tokens: int, kept_pages: int, now_s: float) -> None:
        """It was given the request of `room`, with about `tokens`, because of `kept_pages` among others."""
        self.placed.placed(room, tokens, now_s)
        self.kept.expect(room, kept_pages)
        self.count_work()

    def arrive(self, room: int, tokens: int, local_pages: int, now_s: float) -> None:
        """Its leader rank reported `room`, which has `tokens`, of which `local_pages` are there."""
        self.placed.arrived(room, tokens, now_s)
        self.kept.found(room, local_pages)
        self.count_work()
        if self.role is Role.PREFILL:
            self.token_rate.arrived(tokens)

    def count_work(self) -> None:
        """To be called when `placed` or what the leader reported has changed."""
        placed = self.placed
        self.tokens = self.reported_tokens + placed.tokens
        self.sequences = self.reported_sequences + len(placed)
        free = self.reported_free_tokens
        if free is not None:
            self.free_device_tokens = max(0, free - placed.tokens)

    def count_reads(self) -> None:
        """To be called when a rank's reported or planned reads have changed."""
        # Heartbeats may be a second old and the engine counts our plans too, once it has
        # them: adding the two would count a read twice, the larger one never misses it.
        total = 0
        for rank in self.ranks.values():
            reported, planned = rank.load.read_queue_bytes, rank.planned_bytes
            total += reported if reported > planned else planned
        self.read_queue_bytes = total

    @property
    def leader(self) -> RankInfo:
        """Its address is the engine's.  Raises KeyError unless the leader rank is live."""
        return self.ranks[LEADER_RANK].info

    @property
    def is_complete(self) -> bool:
        """Every rank is live."""
        return self.shape.is_complete

    @property
    def load(self) -> Workload:
        """As last reported, for people: queues and rates add up, the fullest rank limits."""
        loads = [rank.load for rank in self.ranks.values()]
        return Workload(
            sequences=max(load.sequences for load in loads),
            tokens=max(load.tokens for load in loads),
            read_queue_bytes=min(self.read_queue_bytes, MAX_COUNT),
            read_rate_bytes_per_s=min(self.read_rate_bytes_per_s, MAX_RATE),
            host_free_pages=min(load.host_free_pages for load in loads),
            device_free_tokens=min(load.device_free_tokens for load in loads),
            unplanned_read_bytes=_sum(load.unplanned_read_bytes for load in loads),
            held=_sum(load.held for load in loads),
            pool_checks=min(load.pool_checks for load in loads),
            kept_pages=_sum(load.kept_pages for load in loads),
            faults=_sum(load.faults for load in loads),
            ready_tokens=max(load.ready_tokens for load in loads),
            compute_rate_tokens_per_s=max(load.compute_rate_tokens_per_s for load in loads),
        )


def _sum(counts: Iterable[int]) -> int:
    """As much of it as may travel."""
    return min(sum(counts), MAX_COUNT)


def _of_objects(info: RankInfo) -> tuple[str | None, str | None]:
    """What it says of objects that are taken by key: their name, and where it gives them away."""
    return info.objects, info.fetch_endpoint


class EngineWatcher(Protocol):
    """Keeps an index over the engines that can be given requests."""

    def joined(self, engine: EngineState) -> None:
        """All ranks of `engine` are live now."""

    def left(self, engine: EngineState) -> None:
        """No longer so; `engine.ranks` may be empty."""

    def lowered(self, engine: EngineState) -> None:
        """It may have less to do than before.  That it has more is not announced."""


class _Nobody:
    """The watcher of a table that nobody watches."""

    def joined(self, engine: EngineState) -> None: ...

    def left(self, engine: EngineState) -> None: ...

    def lowered(self, engine: EngineState) -> None: ...


class EngineTable:
    """Every live engine.  `expire` must be called before any question that depends on the time."""

    def __init__(
        self,
        expiry_s: float = ENGINE_EXPIRY_S,
        max_engines: int = MAX_ENGINES,
        max_ranks: int = MAX_RANKS,
    ) -> None:
        self._expiry_s = expiry_s
        self._max_engines = max_engines
        self._max_ranks = max_ranks
        self._live: dict[str, EngineState] = {}
        """In the order of their serial numbers."""
        self._serial = 0
        self._by_age: OrderedDict[RankKey, RankState] = OrderedDict()
        """Oldest heartbeat first."""
        self._held: Counter[bytes] = Counter()
        """Ranks by sender."""
        self._gone: list[RankKey] = []
        """Since `expire` said it last."""
        self._retired: OrderedDict[str, Totals] = OrderedDict()
        """Totals of expired engines, for their return."""
        self._watcher: EngineWatcher = _Nobody()
        self._faults = Faults()
        self.object_changes = 0
        """Grows whenever it may be another rank that has, or wants, objects of some name."""

    def watch(self, watcher: EngineWatcher, faults: Faults) -> None:
        """Tell `watcher` about every engine from now on; call it while the table is empty."""
        self._watcher, self._faults = watcher, faults

    def heartbeat(
        self,
        info: RankInfo,
        load: Workload,
        now_s: float,
        versions: tuple[int, int] = (1, 1),
        sender: bytes = b"",
    ) -> None:
        """Register or refresh one rank.  Raises EngineConflict and changes nothing."""
        state = self._live.get(info.engine_id)
        rank = None if state is None else state.ranks.get(info.rank)
        if rank is None or rank.info != info:
            self._check(info, others=() if state is None else state.ranks.values())
        if state is None or rank is None:
            self._make_room(info.engine_id, sender, is_new_engine=state is None)
            state = self._live.get(info.engine_id) or self._enter(info)
            rank = state.ranks[info.rank] = RankState(info, load, now_s, versions, sender)
            self._held[sender] += 1
            self.object_changes += info.objects is not None
            state.reshape()
        elif rank.info != info or rank.versions != versions:
            if _of_objects(rank.info) != _of_objects(info):
                self.object_changes += 1
            rank.info, rank.versions = info, versions
            state.reshape()
        if rank.sender != sender:
            self._held[sender] += 1
            self._let_go(rank.sender)
            rank.sender = sender
        rank.load, rank.heartbeat_s = load, now_s
        key = RankKey(info.engine_id, info.rank)
        self._by_age[key] = rank
        self._by_age.move_to_end(key)

        if info.rank == LEADER_RANK:
            state.reported_tokens, state.reported_sequences = load.tokens, load.sequences
            state.placed.counted(now_s)
            if state.role is Role.PREFILL:
                state.token_rate.heartbeat(load.tokens, now_s)
                state.tokens_per_s = state.token_rate.per_s
        loads = [one.load for one in state.ranks.values()]
        state.read_rate_bytes_per_s = sum([one.read_rate_bytes_per_s for one in loads])
        if load.device_free_tokens or state.reported_free_tokens is not None:
            state.reported_free_tokens = min([one.device_free_tokens for one in loads])
        state.count_work()
        state.count_reads()
        if state.is_complete:
            self._announce(state)

    def _enter(self, info: RankInfo) -> EngineState:
        totals = self._retired.pop(info.engine_id, None) or Totals()
        self._serial += 1
        state = EngineState(info.engine_id, info.role, totals, self._serial)
        self._live[info.engine_id] = state
        return state

    def _let_go(self, sender: bytes) -> None:
        self._held[sender] -= 1
        if not self._held[sender]:
            del self._held[sender]

    def _make_room(self, engine_id: str, sender: bytes, *, is_new_engine: bool) -> None:
        """For one more rank, spoken for by `sender`: at the cost of whoever has most.  Raises EngineConflict.

        So one peer that invents engines can fill the table, but keeps nobody else out.
        """
        is_full = is_new_engine and len(self._live) >= self._max_engines
        if not is_full and len(self._by_age) < self._max_ranks:
            return
        oldest = islice(self._by_age.items(), CANDIDATES)
        key, rank = max(oldest, key=lambda item: self._held[item[1].sender])
        if self._held[rank.sender] <= self._held[sender] + 1:
            raise EngineConflict(
                f"{len(self._live)} engines with {len(self._by_age)} ranks are registered already; "
                f"use another scheduler for engine {engine_id}"
            )
        for rank_number in list(self._live[key.engine_id].ranks):
            self.forget(RankKey(key.engine_id, rank_number))

    def _check(self, info: RankInfo, others: Iterable[RankState]) -> None:
        if info.rank >= info.tp_size:
            raise EngineConflict(
                f"engine {info.engine_id}: rank {info.rank} is not below tp_size {info.tp_size}"
            )
        for other in others:
            names: tuple[str, ...] = ("role", "tp_size", "page_size", "mode")
            if other.info.rank == info.rank:  # ranks on other hosts have other addresses
                names += ("url",)
            for name in names:
                said, known = getattr(info, name), getattr(other.info, name)
                if said != known:
                    raise EngineConflict(
                        f"engine {info.engine_id}: {name} {said} contradicts {known} of its live rank "
                        f"{other.info.rank}; give every engine its own engine_id, or wait "
                        f"{self._expiry_s:g} s after stopping the old one"
                    )

    def expire(self, now_s: float) -> list[RankKey]:
        """Forget ranks without a recent heartbeat, and engines without ranks; returns all that went since."""
        while self._by_age:
            key, rank = next(iter(self._by_age.items()))
            if now_s - rank.heartbeat_s <= self._expiry_s:
                break
            self.forget(key)
        gone, self._gone = self._gone, []
        return gone

    def forget(self, key: RankKey) -> None:
        """The rank is gone, with what was planned for it."""
        rank = self._by_age.pop(key, None)
        if rank is None:
            return
        self._gone.append(key)
        self.object_changes += rank.info.objects is not None
        self._let_go(rank.sender)
        state = self._live[key.engine_id]
        del state.ranks[key.rank]
        if state.ranks:
            state.reshape()
            state.count_reads()
        else:
            del self._live[key.engine_id]
            self._retired[key.engine_id] = state.totals
            if len(self._retired) > self._max_engines:
                self._retired.popitem(last=False)
        if state.is_announced:
            self._withdraw(state)

    def keys_of(self, engine_id: str) -> list[RankKey]:
        """Its live ranks."""
        state = self._live.get(engine_id)
        return [] if state is None else [RankKey(engine_id, rank) for rank in state.ranks]

    def repeats_unversioned(self, info: RankInfo) -> bool:
        """Whether this is what a live rank without versions says of itself."""
        state = self._live.get(info.engine_id)
        rank = None if state is None else state.ranks.get(info.rank)
        return rank is not None and rank.versions == (1, 1) and rank.info == info

    def restarted(self, info: RankInfo, gone: Iterable[RankKey]) -> None:
        """A rank came back over a new connection, and those of the ranks `gone` are closed.

        If it describes itself as before, it is the same process and nothing is forgotten.  Connections of
        one engine close one after the other: what is still there then is forgotten at its next heartbeat.
        """
        state = self._live.get(info.engine_id)
        rank = None if state is None else state.ranks.get(info.rank)
        if rank is None or rank.info != info:
            for key in gone:
                self.forget(key)

    def _announce(self, state: EngineState) -> None:
        """To the watcher; a fault in it costs the engine its placements until its next heartbeat."""
        if state.is_announced:
            self.lowered(state)
            return
        try:
            state.is_announced = True
            self._watcher.joined(state)
        except Exception:
            self._unannounced(state)

    def _unannounced(self, state: EngineState) -> None:
        self._faults.record("placement", "an engine is not placed upon until its next heartbeat")
        state.is_announced = False
        with suppress(Exception):  # the watcher may know half of the engine
            self._watcher.left(state)

    def _withdraw(self, state: EngineState) -> None:
        state.is_announced = False
        try:
            self._watcher.left(state)
        except Exception:
            self._faults.record("placement", "an engine that left may still be chosen")

    def get(self, engine_id: str) -> EngineState | None:
        return self._live.get(engine_id)

    def lowered(self, engine: EngineState) -> None:
        """Tell the watcher that `engine` may have less to do, if it is one it knows."""
        if engine.is_announced:
            try:
                self._watcher.lowered(engine)
            except Exception:
                self._unannounced(engine)

    def helped(self) -> list[EngineState]:
        """Prefill engines that want to know who may help."""
        return [state for state in self._live.values() if state.is_helped]

    def residents(self) -> dict[str, list[Resident]]:
        """By name of objects, who has some: of each decode engine the first rank.

        Where all ranks have the same objects, it is the first one that writes all of them.
        """
        found: dict[str, list[Resident]] = {}
        for state in self._live.values():
            names: set[str] = set()
            for rank, one in sorted(state.ranks.items()) if state.role is Role.DECODE else ():
                objects, endpoint = _of_objects(one.info)
                if objects is not None and endpoint is not None and objects not in names:
                    names.add(objects)
                    found.setdefault(objects, []).append(Resident(state.engine_id, endpoint, rank))
        return found

    def by_kind(self) -> Counter[tuple[Role, Mode]]:
        """How many there are."""
        return Counter((state.role, state.mode) for state in self._live.values())

    def status(self, now_s: float, after: int = 0) -> tuple[EngineStatus, ...]:
        """A page of live engines: of each its lowest rank with the load over all ranks."""
        return tuple(self._engine_status(state, now_s) for state in self._page(after))

    def next_page(self, after: int) -> int | None:
        """What comes after the page `after`; None when that is the last one."""
        page = self._page(after)
        return page[-1].serial if page and page[-1].serial != self._newest() else None

    def _page(self, after: int) -> list[EngineState]:
        return list(islice((state for state in self._live.values() if state.serial > after), STATUS_ENGINES))

    def _newest(self) -> int:
        return self._live[next(reversed(self._live))].serial

    @staticmethod
    def _engine_status(state: EngineState, now_s: float) -> EngineStatus:
        lowest = state.ranks[min(state.ranks)]
        load, totals = state.load, state.totals
        return EngineStatus(
            engine=lowest.info,
            load=load,
            age_s=max(0.0, now_s - lowest.heartbeat_s),
            store_read_bytes=_sum((totals.store_read_bytes, load.unplanned_read_bytes)),
            forwarded_bytes=_sum((totals.forwarded_bytes,)),
            loaded_pages=_sum((totals.loaded_pages,)),
        )
