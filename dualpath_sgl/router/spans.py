"""The router's spans: `route`, with `place` and one `upstream` per engine and attempt below it.

Each continues the client's `traceparent`, or begins a trace.  A router that exports no spans does
not put itself into the trace: the engines then hang from the client's span directly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry.context import Context
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import (
    INVALID_SPAN,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    get_current_span,
    set_span_in_context,
)

from scheduler_svc.telemetry.tracing import context_from, init_tracing, shutdown

SERVICE_NAME = "dualpath-router"
_ids = RandomIdGenerator()


class RouterSpans:
    def __init__(self, otlp_endpoint: str | None) -> None:
        self._tracer: Tracer | None = None
        if otlp_endpoint is not None:
            self._tracer = init_tracing(SERVICE_NAME, otlp_endpoint)

    @property
    def exports(self) -> bool:
        return self._tracer is not None

    def close(self) -> None:
        """Export what is left."""
        shutdown()

    @contextmanager
    def route(self, traceparent: str | None, attributes: Mapping[str, str]) -> Iterator[Span]:
        """The span of a whole client request."""
        parent = context_from(traceparent)
        if self._tracer is None:
            incoming = get_current_span(parent)
            yield incoming if incoming is not INVALID_SPAN else _fresh()
            return
        with _ended(self._tracer.start_span("route", parent, SpanKind.SERVER, attributes)) as span:
            yield span

    @contextmanager
    def child(
        self, name: str, parent: Span, attributes: Mapping[str, str | int] | None = None
    ) -> Iterator[Span]:
        if self._tracer is None:
            yield parent
            return
        context = set_span_in_context(parent, Context())
        with _ended(self._tracer.start_span(name, context, SpanKind.CLIENT, attributes)) as span:
            yield span


def failed(span: Span, problem: str) -> None:
    span.set_status(Status(StatusCode.ERROR, problem))


@contextmanager
def _ended(span: Span) -> Iterator[Span]:
    """Ends the span, also when it is cancelled; an exception is its status."""
    try:
        yield span
    except Exception as error:
        failed(span, str(error) or type(error).__name__)
        raise
    finally:
        if span.is_recording():
            span.end()


def _fresh() -> Span:
    """Two engines that trace join one trace even when neither client nor router is in it."""
    return NonRecordingSpan(
        SpanContext(
            _ids.generate_trace_id(),
            _ids.generate_span_id(),
            is_remote=True,
            trace_flags=TraceFlags(TraceFlags.SAMPLED),
        )
    )
