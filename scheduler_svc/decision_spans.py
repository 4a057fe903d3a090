"""The scheduler's own spans: one for each decision, one for each read that ended."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer

from scheduler_svc.events import Event, PlaceDecided, PlanDecided, ReadEnded
from scheduler_svc.telemetry import span_names
from scheduler_svc.telemetry.tracing import MAX_ATTRIBUTE, context_from
from scheduler_svc.wire.protocol import Loaded


class DecisionSpans:
    """Turns the scheduler's decisions into spans `place` and `plan PATH`, and what became of a plan into
    a span `plan.outcome` per rank: a decision's span ends with the decision."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def __call__(self, event: Event) -> None:
        match event:
            case PlanDecided():
                self._plan(event)
            case PlaceDecided():
                self._place(event)
            case ReadEnded():
                self._outcome(event)

    def _span(
        self,
        name: str,
        traceparent: str | None,
        attributes: Mapping[str, Any],
        lasted_s: float = 0.0,
        fallback: str | None = None,
    ) -> None:
        """A span that ends now, because events carry monotonic times; attributes of None are left out."""
        end_ns = time.time_ns()
        span = self._tracer.start_span(
            name,
            context=context_from(traceparent),
            kind=SpanKind.SERVER,
            start_time=end_ns - int(lasted_s * 1e9),
            attributes={
                f"dualpath.{key}": min(value, MAX_ATTRIBUTE) if isinstance(value, int) else value
                for key, value in attributes.items()
                if value is not None
            },
        )
        if fallback is not None:
            span.set_attributes({"dualpath.fallback.reason": fallback, "error.type": "dualpath.fallback"})
            span.set_status(Status(StatusCode.ERROR, fallback))
        span.end(end_ns)

    def _plan(self, event: PlanDecided) -> None:
        plan, lanes = event.plan, event.lanes
        attributes = {
            "room": str(plan.room),
            "path": plan.shown_path,
            "split.pages": plan.split_page,
            "hit.pages": plan.hit_pages,
            "prefill.local_pages": plan.prefill_local_pages,
            "decode.local_pages": plan.decode_local_pages,
            "prefill.engine": plan.prefill_id,
            "decode.engine": plan.decode_id,
            "policy": plan.policy,
            "reason": str(event.reason),
            "prefill.queue_bytes": lanes.prefill_queue_bytes,
            "decode.queue_bytes": lanes.decode_queue_bytes,
            "prefill.rate_bytes_per_s": lanes.prefill_rate_bytes_per_s,
            "decode.rate_bytes_per_s": lanes.decode_rate_bytes_per_s,
            "prefill.expected_end_s": lanes.prefill_end_s,
            "decode.expected_end_s": lanes.decode_end_s,
        }
        name = f"{span_names.PLAN} {plan.shown_path}"
        waited_s = event.decided_s - event.first_report_s
        self._span(name, event.traceparent, attributes, waited_s, event.fallback)

    def _place(self, event: PlaceDecided) -> None:
        placement = event.placement
        attributes = {
            "room": str(placement.room),
            "request_id": placement.request_id,
            "prefill.engine": placement.prefill.engine_id,
            "decode.engine": placement.decode.engine_id,
            "session": event.session_id,
            "placement": event.policy,
            "prefill.expected_wait_s": event.prefill_wait_s,
            "decode.expected_wait_s": event.decode_wait_s,
        }
        self._span("place", event.traceparent, {**attributes, **event.inputs})

    def _outcome(self, event: ReadEnded) -> None:
        attributes = {
            "room": str(event.room),
            "side": event.role,
            "engine": event.engine_id,
            "expected_s": event.expected_s,
            "actual_s": event.actual_s,
            "error_s": event.error_s,
        }
        self._span("plan.outcome", event.traceparent, attributes)


def loaded_attributes(loaded: Loaded) -> dict[str, str | int]:
    """What became of a request's KV, for the span of the whole request."""
    known: dict[str, str | int | None] = {
        "dualpath.path": loaded.path,
        "dualpath.split.pages": loaded.split_page,
        "dualpath.hit.pages": loaded.hit_pages,
        "dualpath.prefill.read_bytes": loaded.prefill_read_bytes,
        "dualpath.decode.read_bytes": loaded.decode_read_bytes,
        "dualpath.forwarded_bytes": loaded.forwarded_bytes,
        "dualpath.fallback.reason": "; ".join(loaded.fallbacks) or None,
    }
    return {name: value for name, value in known.items() if value is not None}
