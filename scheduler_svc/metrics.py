"""Prometheus metrics of the scheduler, fed by `scheduler_svc.events`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge

from scheduler_svc.events import (
    Event,
    FallbackSeen,
    PlaceDecided,
    PlanDecided,
    RankDone,
    RankFaults,
    ReadEnded,
)
from scheduler_svc.telemetry import build
from scheduler_svc.telemetry.tally import CounterTally, HistogramTally
from scheduler_svc.telemetry.tracing import exported_trace
from scheduler_svc.wire.protocol import ErrorCode, Path, Role

PLAN_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
TIME_BUCKETS_S = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
REFUSALS = ("auth", "protocol", "no_detail", "accept", "endless")
STEPS = (
    *(
        "the loop",
        "looking at connections",
        "handling a message",
        "sending",
        "telling who may help",
        "observing",
    ),
    *(
        "expiry",
        "expiry of rooms",
        "expiry of engines",
        "expiry of relays",
        "placement",
        "metrics",
        "logging",
    ),
)
"""In which a fault can be."""
ROLES = [(role.value,) for role in Role]


class Metrics:
    """One registry per server, so that several can live in one process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        build.tell(registry, "scheduler")
        self.errors = Counter(
            "dualpath_scheduler_errors",
            "Messages answered with an error, by code.",
            ["code"],
            registry=registry,
        )
        self.undelivered = Counter(
            "dualpath_scheduler_undelivered",
            "Messages whose receiver was gone or stuck.",
            registry=registry,
        )
        self.refused_connections = Counter(
            "dualpath_scheduler_refused_connections",
            "Connections that were refused (auth, protocol, no_detail, accept) or cut (endless).",
            ["reason"],
            registry=registry,
        )
        self.faults = Counter(
            "dualpath_scheduler_faults",
            "Exceptions in the scheduler's own code, by step.",
            ["step"],
            registry=registry,
        )
        self._engine_faults = CounterTally(
            registry, "dualpath_engine_faults", "Exceptions in DualPath's code on engines.", ["engine"]
        )
        self.rooms_open = Gauge("dualpath_rooms_open", "Rooms not closed yet.", registry=registry)
        self.rooms_forgotten = Counter(
            "dualpath_rooms_forgotten",
            "Rooms that never ended, given up for their age or for want of room.",
            registry=registry,
        )
        self.engines = Gauge(
            "dualpath_scheduler_engines",
            "Engines that heartbeat, by role and mode.",
            ["role", "mode"],
            registry=registry,
        )
        self.relays = Gauge(
            "dualpath_scheduler_relays",
            "Relays that heartbeat, by state: serving, draining.",
            ["state"],
            registry=registry,
        )
        self.prefill_engines_by_help = Gauge(
            "dualpath_scheduler_prefill_engines",
            "Prefill engines that relays may help, by help: helped, hidden (loading hides behind computing), "
            "alone (in mode relay, and there is none).",
            ["help"],
            registry=registry,
        )
        self.residents = Gauge(
            "dualpath_scheduler_residents",
            "Decode engine ranks that give away by key what they hold.",
            registry=registry,
        )
        self.helpers_told = Counter(
            "dualpath_scheduler_helpers_told",
            "Messages that told a prefill engine rank who may help.",
            registry=registry,
        )
        self._placements = CounterTally(
            registry,
            "dualpath_placements",
            "Requests placed, by the PE's class and the rule that chose the DE.",
            ["prefill_class", "decode_rule"],
        )
        self._session_placements = CounterTally(
            registry,
            "dualpath_session_placements",
            "Requests placed on an engine that holds pages of their session.",
            ["role"],
            ROLES,
        )
        self._placement_wait_seconds = HistogramTally(
            registry,
            "dualpath_placement_wait_seconds",
            "Until the chosen engine is expected to get to a request.",
            TIME_BUCKETS_S,
            ["role"],
            ROLES,
        )
        self._plans = CounterTally(
            registry, "dualpath_plans", "Rooms planned, by path.", ["path"], [(path.value,) for path in Path]
        )
        self._plan_seconds = HistogramTally(
            registry, "dualpath_plan_seconds", "From a room's first report to its plan.", PLAN_BUCKETS_S
        )
        self._fallbacks = CounterTally(
            registry, "dualpath_fallbacks", "Rooms that left their plan, by reason.", ["reason"]
        )
        self._store_read_bytes = CounterTally(
            registry, "dualpath_store_read_bytes", "Bytes read from the store.", ["engine"]
        )
        self._forwarded_bytes = CounterTally(
            registry, "dualpath_forwarded_bytes", "Bytes read out of a peer's host pool.", ["engine"]
        )
        self._duplicate_store_pages = CounterTally(
            registry,
            "dualpath_duplicate_store_pages",
            "Pages of one room that both engines read from the store.",
        )
        self._read_seconds = HistogramTally(
            registry,
            "dualpath_store_read_seconds",
            "Planned storage reads, from hand-over to end, queue included.",
            TIME_BUCKETS_S,
            ["role"],
            ROLES,
        )
        self._read_error_seconds = HistogramTally(
            registry,
            "dualpath_store_read_error_seconds",
            "How far planned storage reads ended from when the plan expected, early or late.",
            TIME_BUCKETS_S,
            ["role", "direction"],
            [(role.value, direction) for role in Role for direction in ("early", "late")],
        )
        for code in ErrorCode:
            self.errors.labels(code.value)
        for reason in REFUSALS:
            self.refused_connections.labels(reason)
        for step in STEPS:
            self.faults.labels(step)

        self._handlers: dict[type[Event], Callable[[Any], None]] = {
            PlaceDecided: self._place,
            PlanDecided: self._plan,
            RankDone: self._done,
            RankFaults: self._rank_faults,
            ReadEnded: self._read,
            FallbackSeen: self._fallback,
        }

    def __call__(self, event: Event) -> None:
        self._handlers[type(event)](event)

    def _plan(self, event: PlanDecided) -> None:
        self._plans.add(1, event.plan.path)
        trace_id = exported_trace(event.traceparent)
        self._plan_seconds.observe(event.decided_s - event.first_report_s, trace_id=trace_id)

    def _done(self, event: RankDone) -> None:
        if event.store_read_bytes:
            self._store_read_bytes.add(event.store_read_bytes, event.engine_id)
        if event.forwarded_bytes:
            self._forwarded_bytes.add(event.forwarded_bytes, event.engine_id)
        if event.duplicate_store_pages:
            self._duplicate_store_pages.add(event.duplicate_store_pages)

    def _rank_faults(self, event: RankFaults) -> None:
        self._engine_faults.add(event.faults, event.engine_id)

    def _read(self, event: ReadEnded) -> None:
        role, error_s, trace_id = event.role, event.error_s, exported_trace(event.traceparent)
        self._read_seconds.observe(event.actual_s, role, trace_id=trace_id)
        direction = "late" if error_s > 0 else "early"
        self._read_error_seconds.observe(abs(error_s), role, direction, trace_id=trace_id)

    def _fallback(self, event: FallbackSeen) -> None:
        self._fallbacks.add(1, event.reason)

    def _place(self, event: PlaceDecided) -> None:
        inputs = event.inputs
        self._placements.add(
            1, str(inputs.get("prefill.class", "any")), str(inputs.get("decode.rule", "any"))
        )
        trace_id = exported_trace(event.traceparent)
        self._placement_wait_seconds.observe(event.prefill_wait_s, "prefill", trace_id=trace_id)
        self._placement_wait_seconds.observe(event.decode_wait_s, "decode", trace_id=trace_id)
        if inputs.get("prefill.saved_bytes"):
            self._session_placements.add(1, "prefill")
        if inputs.get("decode.saved_bytes"):
            self._session_placements.add(1, "decode")
