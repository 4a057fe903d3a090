"""OpenTelemetry set-up shared by scheduler, engines, router and evals.

Every process makes its own provider: the global one belongs to SGLang.  Trace context travels
as a W3C `traceparent` string in requests and wire messages.
"""

from __future__ import annotations

from collections.abc import Mapping

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.trace import Span, TraceFlags, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

EXPORT_DELAY_MS = 200
"""Short, so that a trace is complete soon after its request."""

EXPORT_TIMEOUT_S = 2.0
"""Bounds what an absent collector can cost at shutdown."""

MAX_ATTRIBUTE = 2**63 - 1
"""OTLP's integers have 64 bits; one that is longer would cost every span exported with it."""

_propagator = TraceContextTextMapPropagator()
_providers: list[TracerProvider] = []


def init_tracing(
    service_name: str,
    otlp_endpoint: str | None,
    attributes: Mapping[str, str | int] | None = None,
    ids: IdGenerator | None = None,
) -> Tracer:
    """A tracer that exports to `otlp_endpoint` (OTLP over gRPC, e.g. `http://127.0.0.1:4317`).

    Without an endpoint spans get ids, so that context propagates, and are dropped.  `attributes`
    go on the resource; `ids` makes the spans' ids.  TLS only for an `https://` endpoint.
    """
    resource = Resource.create({SERVICE_NAME: service_name, **(attributes or {})})
    provider = TracerProvider(resource=resource, id_generator=ids)
    if otlp_endpoint is not None:
        insecure = not otlp_endpoint.startswith("https://")
        exporter = OTLPSpanExporter(
            endpoint=otlp_endpoint,
            insecure=insecure,
            timeout=EXPORT_TIMEOUT_S,
            # Plain text stays on a network of one's own: gRPC would take it to `http_proxy` else.
            # (The exporter's types know options of text only; gRPC's are numbers, too.)
            channel_options=(("grpc.enable_http_proxy", 0),) if insecure else None,  # type: ignore[arg-type]
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


def exported_trace(traceparent: str | None) -> str | None:
    """The trace's id, if it is one that is sampled."""
    if traceparent is None or not int(traceparent[53:55], 16) & TraceFlags.SAMPLED:
        return None
    return traceparent[3:35]
