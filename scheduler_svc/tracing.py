"""OpenTelemetry set-up shared by scheduler, engines and evals, and the scheduler's own spans.

Every process makes its own provider: the global one belongs to SGLang.  Trace context travels
as a W3C `traceparent` string in requests and wire messages.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from scheduler_svc.state import Event, PlaceDecided, PlanDecided

EXPORT_DELAY_MS = 200
"""Short, so that a trace is complete soon after its request."""

EXPORT_TIMEOUT_S = 2.0
"""Bounds what an absent collector can cost at shutdown."""

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
        exporter = OTLPSpanExporter(
            endpoint=otlp_endpoint,
            insecure=not otlp_endpoint.startswith("https://"),
            timeout=EXPORT_TIMEOUT_S,
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
    """Turns the scheduler's decisions into spans `plan` and `place`."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def __call__(self, event: Event) -> None:
        match event:
            case PlanDecided():
                self._plan(event)
            case PlaceDecided():
                self._place(event)

    def _plan(self, event: PlanDecided) -> None:
        plan = event.plan
        # Events carry monotonic times; the decision is taken as now.
        end_ns = time.time_ns()
        start_ns = end_ns - int((event.decided_s - event.first_report_s) * 1e9)
        self._tracer.start_span(
            "plan",
            context=context_from(event.traceparent),
            start_time=start_ns,
            attributes={
                "dualpath.room": plan.room,
                "dualpath.path": plan.path,
                "dualpath.split.pages": plan.split_page,
                "dualpath.hit.pages": plan.hit_pages,
                "dualpath.prefill.local_pages": plan.prefill_local_pages,
                "dualpath.decode.local_pages": plan.decode_local_pages,
                "dualpath.prefill.engine": plan.prefill_id,
                "dualpath.decode.engine": plan.decode_id,
                "dualpath.policy": plan.policy,
                "dualpath.reason": plan.reason,
            },
        ).end(end_ns)

    def _place(self, event: PlaceDecided) -> None:
        placement = event.placement
        attributes = {
            "dualpath.room": placement.room,
            "dualpath.request_id": placement.request_id,
            "dualpath.prefill.engine": placement.prefill.engine_id,
            "dualpath.decode.engine": placement.decode.engine_id,
        }
        if event.session_id is not None:
            attributes["dualpath.session"] = event.session_id
        self._tracer.start_span("place", context=context_from(event.traceparent), attributes=attributes).end()
