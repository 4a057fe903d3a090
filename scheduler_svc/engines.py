"""Engines the scheduler knows: each rank as its last heartbeat described it, plus what is planned.

An engine is live while at least one rank's heartbeat is younger than `ENGINE_EXPIRY_S`.  A rank
that expires takes its planned bytes with it: rooms keep a reference to the `RankState` they
charged, so a later release cannot touch the state of a restarted engine.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from scheduler_svc.protocol import Engine, EngineStatus, Load, Role

ENGINE_EXPIRY_S = 5.0
"""Five missed heartbeats."""

MAX_ENGINES = 16_384


class EngineConflict(ValueError):
    """A heartbeat contradicts a live rank of the same engine, or there is no room for it."""


class RankKey(NamedTuple):
    engine_id: str
    rank: int


@dataclass(slots=True)
class RankState:
    engine: Engine
    load: Load
    heartbeat_s: float
    planned_bytes: int = 0
    """Storage reads planned for this rank and not yet reported done."""

    @property
    def read_queue_bytes(self) -> int:
        # Heartbeats are up to a second old and the engine counts our plans too, once it has
        # them: adding the two would count a read twice, the larger one never misses it.
        return max(self.load.read_queue_bytes, self.planned_bytes)


@dataclass(slots=True)
class Totals:
    """What an engine has done since the scheduler first saw it."""

    store_read_bytes: int = 0
    forwarded_bytes: int = 0
    loaded_pages: int = 0


@dataclass(slots=True)
class EngineState:
    """One engine between its first heartbeat and its expiry."""

    engine_id: str
    totals: Totals
    ranks: dict[int, RankState] = field(default_factory=dict)

    @property
    def any_rank(self) -> Engine:
        """Role, tp_size, url and page_size are the same on every rank."""
        return next(iter(self.ranks.values())).engine

    @property
    def is_complete(self) -> bool:
        return len(self.ranks) == self.any_rank.tp_size

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all ranks."""
        return sum(rank.engine.page_bytes for rank in self.ranks.values())

    @property
    def load(self) -> Load:
        """Queues and rates add up over ranks; every rank runs the same sequences; the fullest rank limits."""
        ranks = self.ranks.values()
        return Load.model_construct(
            sequences=max(rank.load.sequences for rank in ranks),
            tokens=max(rank.load.tokens for rank in ranks),
            read_queue_bytes=sum(rank.read_queue_bytes for rank in ranks),
            read_rate_bytes_per_s=sum(rank.load.read_rate_bytes_per_s for rank in ranks),
            host_free_pages=min(rank.load.host_free_pages for rank in ranks),
            device_free_tokens=min(rank.load.device_free_tokens for rank in ranks),
            unplanned_read_bytes=sum(rank.load.unplanned_read_bytes for rank in ranks),
        )

    @property
    def page_endpoints(self) -> tuple[str, ...]:
        """Page servers in rank order; shorter than tp_size when a rank has none."""
        endpoints = (self.ranks[rank].engine.page_endpoint for rank in sorted(self.ranks))
        return tuple(endpoint for endpoint in endpoints if endpoint is not None)


class EngineTable:
    """Every live engine.  `expire` must be called before any question that depends on the time."""

    def __init__(self, expiry_s: float = ENGINE_EXPIRY_S, max_engines: int = MAX_ENGINES) -> None:
        self._expiry_s = expiry_s
        self._max_engines = max_engines
        self._live: dict[str, EngineState] = {}
        self._by_age: OrderedDict[RankKey, RankState] = OrderedDict()
        """Oldest heartbeat first."""
        self._retired: OrderedDict[str, Totals] = OrderedDict()
        """Totals of expired engines, for their return."""

    def heartbeat(self, engine: Engine, load: Load, now_s: float) -> None:
        """Register or refresh one rank.  Raises EngineConflict and changes nothing."""
        state = self._live.get(engine.engine_id)
        if state is None:
            if len(self._live) >= self._max_engines:
                raise EngineConflict(
                    f"engine {engine.engine_id}: {self._max_engines} engines are registered already"
                )
            self._check(engine, others=())
            totals = self._retired.pop(engine.engine_id, None) or Totals()
            state = self._live[engine.engine_id] = EngineState(engine.engine_id, totals)
        else:
            self._check(engine, others=state.ranks.values())
        rank = state.ranks.get(engine.rank)
        if rank is None:
            rank = state.ranks[engine.rank] = RankState(engine, load, now_s)
        rank.engine, rank.load, rank.heartbeat_s = engine, load, now_s
        key = RankKey(engine.engine_id, engine.rank)
        self._by_age[key] = rank
        self._by_age.move_to_end(key)

    def _check(self, engine: Engine, others: Iterable[RankState]) -> None:
        if engine.rank >= engine.tp_size:
            raise EngineConflict(
                f"engine {engine.engine_id}: rank {engine.rank} is not below tp_size {engine.tp_size}"
            )
        for other in others:
            for name in ("role", "tp_size", "url", "page_size"):
                said, known = getattr(engine, name), getattr(other.engine, name)
                if said != known:
                    raise EngineConflict(
                        f"engine {engine.engine_id}: {name} {said} contradicts {known} of its live rank "
                        f"{other.engine.rank}; give every engine its own engine_id, or wait "
                        f"{self._expiry_s:g} s after stopping the old one"
                    )

    def expire(self, now_s: float) -> list[RankKey]:
        """Forget ranks without a recent heartbeat, and engines without ranks."""
        gone = []
        while self._by_age:
            key, rank = next(iter(self._by_age.items()))
            if now_s - rank.heartbeat_s <= self._expiry_s:
                break
            del self._by_age[key]
            state = self._live[key.engine_id]
            del state.ranks[key.rank]
            if not state.ranks:
                del self._live[key.engine_id]
                self._retired[key.engine_id] = state.totals
                if len(self._retired) > self._max_engines:
                    self._retired.popitem(last=False)
            gone.append(key)
        return gone

    def get(self, engine_id: str) -> EngineState | None:
        return self._live.get(engine_id)

    def leaders(self, role: Role) -> list[Engine]:
        """Rank 0 of every live engine of a role, in order of registration."""
        return [
            state.ranks[0].engine
            for state in self._live.values()
            if 0 in state.ranks and state.any_rank.role is role
        ]

    def status(self, now_s: float) -> tuple[EngineStatus, ...]:
        """One entry per live engine: its lowest rank with the load over all ranks."""
        return tuple(self._engine_status(state, now_s) for state in self._live.values())

    @staticmethod
    def _engine_status(state: EngineState, now_s: float) -> EngineStatus:
        lowest = state.ranks[min(state.ranks)]
        load = state.load
        return EngineStatus(
            engine=lowest.engine,
            load=load,
            age_s=max(0.0, now_s - lowest.heartbeat_s),
            store_read_bytes=state.totals.store_read_bytes + load.unplanned_read_bytes,
            forwarded_bytes=state.totals.forwarded_bytes,
            loaded_pages=state.totals.loaded_pages,
        )
