"""OpenTelemetry set-up shared by scheduler, engines and evals, and the scheduler's own spans.

Every process makes its own provider: the global one belongs to SGLang.  Trace context travels
as a W3C `traceparent` string in requests and wire messages.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from scheduler_svc.events import Event, PlaceDecided, PlanDecided, ReadEnded

EXPORT_DELAY_MS = 200
"""Short, so that a trace is complete soon after its request."""

EXPORT_TIMEOUT_S = 2.0
"""Bounds what an absent collector can cost at shutdown."""

MAX_ATTRIBUTE = 2**63 - 1
"""OTLP's integers have 64 bits; one that is longer would cost every span exported with it."""

_propagator = TraceContextTextMapPropagator()
_providers: list[TracerProvider] = []


def init_tracing(
    service_name: str, otlp_endpoint: str | None, attributes: Mapping[str, str | int] | None = None
) -> Tracer:
    """A tracer that exports to `otlp_endpoint` (OTLP over gRPC, e.g. `http://127.0.0.1:4317`).

    Without an endpoint spans get ids, so that context propagates, and are dropped.  `attributes`
    go on the resource.  TLS only for an `https://` endpoint.
    """
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: service_name, **(attributes or {})}))
    if otlp_endpoint is not None:
        insecure = not otlp_endpoint.startswith("https://")
        exporter = OTLPSpanExporter(
            endpoint=otlp_endpoint,
            insecure=insecure,
            timeout=EXPORT_TIMEOUT_S,
            # Plain text stays on a network of one's own: gRPC would take it to `http_proxy` else.
            channel_options=(("grpc.enable_http_proxy", 0),) if insecure else None,
        )
        provider.add_span_processor(
            BatchSpanProcessor(
                exporter,
                schedule_delay_millis=EXPORT_DELAY_MS,
                export_timeout_millis=EXPORT_TIMEOUT_S * 1000,
            )
        )
    _providers.append(provider)
    return provider.get_tracer("dualpath")


def shutdown() -> None:
    """Export what is queued and stop every tracer made here.  Safe to call twice."""
    while _providers:
        _providers.pop().shutdown()


def context_from(traceparent: str | None) -> Context:
    """The remote parent; an empty context (a new trace) when there is none or it is malformed."""
    carrier = {"traceparent": traceparent} if traceparent else {}
    return _propagator.extract(carrier, context=Context())


def traceparent_of(span: Span) -> str | None:
    """W3C `traceparent` to hand to the next process; None when the span has no valid context."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, context=set_span_in_context(span, Context()))
    return carrier.get("traceparent")


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
        self._span("place", event.traceparent, attributes | event.inputs)

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
