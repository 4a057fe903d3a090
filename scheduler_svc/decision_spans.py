"""The scheduler's own spans: one for each decision, one for each read that ended."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from opentelemetry.trace import Tracer

from scheduler_svc.events import Event, PlaceDecided, PlanDecided, ReadEnded
from scheduler_svc.telemetry.tracing import MAX_ATTRIBUTE, context_from


class DecisionSpans:
    """Turns the scheduler's decisions into spans `place` and `plan`, and what became of a plan into
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
        self, name: str, traceparent: str | None, attributes: Mapping[str, Any], lasted_s: float = 0.0
    ) -> None:
        """A span that ends now, because events carry monotonic times; attributes of None are left out."""
        end_ns = time.time_ns()
        self._tracer.start_span(
            name,
            context=context_from(traceparent),
            start_time=end_ns - int(lasted_s * 1e9),
            attributes={
                f"dualpath.{key}": min(value, MAX_ATTRIBUTE) if isinstance(value, int) else value
                for key, value in attributes.items()
                if value is not None
            },
        ).end(end_ns)

    def _plan(self, event: PlanDecided) -> None:
        plan, lanes = event.plan, event.lanes
        attributes = {
            "room": plan.room,
            "path": plan.path,
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
        self._span("plan", event.traceparent, attributes, event.decided_s - event.first_report_s)

    def _place(self, event: PlaceDecided) -> None:
        placement = event.placement
        attributes = {
            "room": placement.room,
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
            "room": event.room,
            "side": event.role,
            "engine": event.engine_id,
            "expected_s": event.expected_s,
            "actual_s": event.actual_s,
            "error_s": event.error_s,
        }
        self._span("plan.outcome", event.traceparent, attributes)
