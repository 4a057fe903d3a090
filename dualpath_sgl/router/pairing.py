"""Which pair of engines serves a request: the scheduler's choice, or the router's own.

The router's own is taken for every engine that the scheduler does not name, that this router does not
admit, that is known to be down here, or that has just refused this request.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple

from opentelemetry.trace import Span

from dualpath_sgl.router.fleet.engines import Engine, EngineDirectory
from dualpath_sgl.router.fleet.errors import NoEngine
from dualpath_sgl.router.metrics import RouterMetrics
from dualpath_sgl.router.placement import PlacementClient, SchedulerAway
from dualpath_sgl.router.request import ClientRequest
from dualpath_sgl.router.spans import RouterSpans
from scheduler_svc.decision_spans import loaded_attributes
from scheduler_svc.telemetry.tracing import traceparent_of
from scheduler_svc.wire.protocol import PROTOCOL_VERSION, Place, Role

ROOM_BITS = 63
_random = random.SystemRandom()


class PlacedBy(StrEnum):
    SCHEDULER = "scheduler"
    ROUTER = "router"


class Pair(NamedTuple):
    prefill: Engine
    decode: Engine
    room: int
    placed_by: PlacedBy
    """ROUTER as soon as one of the engines is the router's choice."""
    reason: str = ""
    """Why the router chose."""
    dp_ranks: Mapping[Role, int] = MappingProxyType({})
    """The DP rank that the scheduler chose inside a server with several; without one SGLang chooses."""

    @property
    def runs_dualpath(self) -> bool:
        """As far as the scheduler has told."""
        return self.prefill.registered and self.decode.registered

    def engine(self, role: Role) -> Engine:
        return self.prefill if role is Role.PREFILL else self.decode


class Pairing:
    def __init__(
        self,
        scheduler: PlacementClient,
        directory: EngineDirectory,
        spans: RouterSpans,
        metrics: RouterMetrics,
    ) -> None:
        self._scheduler = scheduler
        self._directory = directory
        self._spans = spans
        self._metrics = metrics

    async def first(self, request: ClientRequest, parent: Span) -> Pair:
        """Ask the scheduler.  Raises NoEngine."""
        with self._spans.child("place", parent) as span:
            try:
                pair = await self._placed(request, traceparent_of(span))
            except SchedulerAway as away:
                pair = self._own(_new_room(), {}, {}, {}, str(away))
            span.set_attributes(attributes_of(pair))
            self._metrics.placed(pair.placed_by.value)
            return pair

    def outcome(self, pair: Pair) -> dict[str, str | int]:
        """For the span of the whole request: what became of its KV, as far as the scheduler has told."""
        loaded = self._scheduler.loaded(pair.room)
        return {} if loaded is None else loaded_attributes(loaded)

    def again(self, before: Pair, refusals: Mapping[Engine, str]) -> Pair:
        """Another pair, without the engines that refused; the others stay.  Raises NoEngine."""
        kept = {role: before.engine(role) for role in Role if before.engine(role) not in refusals}
        # A new room: the engine that took the first attempt may still be waiting in the old one.
        return self._own(_new_room(), kept, before.dp_ranks, refusals, "; ".join(refusals.values()))

    async def _placed(self, request: ClientRequest, traceparent: str | None) -> Pair:
        question = Place(
            request_id=uuid.uuid4().hex,
            session_id=request.session_id,
            prompt_tokens=request.prompt_tokens,
            traceparent=traceparent,
            version=PROTOCOL_VERSION,
            oldest_version=PROTOCOL_VERSION,
            tell_loaded=self._spans.exports,
        )
        with self._metrics.scheduler_asked():
            placement = await self._scheduler.place(question)
        chosen = {Role.PREFILL: placement.prefill, Role.DECODE: placement.decode}
        usable: dict[Role, Engine] = {}
        problems: list[str] = []
        for role, described in chosen.items():
            engine = self._directory.named(role, described.url, described.bootstrap_port)
            if engine is None:
                self._metrics.not_admitted(role)
                problems.append(f"{described.url} is not admitted")
            elif not engine.is_up:
                problems.append(f"{engine.url} is down: {engine.problem}")
            else:
                usable[role] = engine
        dp_ranks = {role: one.dp_rank for role, one in chosen.items() if one.dp_rank is not None}
        if problems:
            return self._own(placement.room, usable, dp_ranks, {}, "; ".join(problems))
        return Pair(
            usable[Role.PREFILL],
            usable[Role.DECODE],
            placement.room,
            PlacedBy.SCHEDULER,
            dp_ranks=dp_ranks,
        )

    def _own(
        self,
        room: int,
        kept: Mapping[Role, Engine],
        dp_ranks: Mapping[Role, int],
        refusals: Mapping[Engine, str],
        reason: str,
    ) -> Pair:
        """`dp_ranks`: what was chosen inside the kept engines, and possibly others."""
        prefill, decode = (
            kept.get(role) or self._choose(role, refusals) for role in (Role.PREFILL, Role.DECODE)
        )
        kept_ranks = {role: rank for role, rank in dp_ranks.items() if role in kept}
        return Pair(prefill, decode, room, PlacedBy.ROUTER, reason, kept_ranks)

    def _choose(self, role: Role, refusals: Mapping[Engine, str]) -> Engine:
        engine = self._directory.choose(role, refusals)
        if engine is None:
            problems = ", ".join(
                f"{engine.url} ({refusals.get(engine) or engine.problem})"
                for engine in self._directory.of(role)
            )
            raise NoEngine(f"no {role} engine takes requests: {problems}; try again later")
        return engine


def attributes_of(pair: Pair) -> dict[str, str | int]:
    """For spans."""
    return {
        "dualpath.room": str(pair.room),
        "dualpath.prefill.url": pair.prefill.url,
        "dualpath.decode.url": pair.decode.url,
        "dualpath.placed_by": pair.placed_by.value,
        **({"dualpath.fallback.reason": pair.reason} if pair.reason else {}),
    }


def _new_room() -> int:
    return _random.getrandbits(ROOM_BITS)
