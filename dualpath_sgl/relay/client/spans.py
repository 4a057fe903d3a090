"""What a trace says about one load: how much came, who brought it, how fast, and why nobody helped."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from opentelemetry.trace import Span, Status, StatusCode, Tracer

from dualpath_sgl.relay.client.prefetch.call import Call
from scheduler_svc.telemetry import span_names
from scheduler_svc.telemetry.tracing import context_from, traceparent_of

OWN = ""
"""The engine's own client, where others have a relay's name."""


@dataclass
class Told:
    """Filled in by whoever loads."""

    traceparent: str | None = None
    """Of this load."""
    objects: int = 0
    brought: Mapping[str, int] = field(default_factory=dict)
    """Bytes by relay, and by `OWN`."""
    fallback: str | None = None
    """Why relays did not do what they should."""
    reason: str | None = None
    """Why they should do nothing."""


@contextmanager
def of_load(tracer: Tracer | None, call: Call) -> Iterator[Told]:
    """One span, in the trace of the request that loads; none without a tracer."""
    told = Told()
    if tracer is None:
        yield told
        return
    begun_s = time.monotonic()
    span = tracer.start_span(span_names.RELAY_TO_PREFILL, context=context_from(call.traceparent))
    told.traceparent = traceparent_of(span)
    try:
        yield told
    finally:
        _write(span, call, told, max(time.monotonic() - begun_s, 1e-6))
        span.end()


def _write(span: Span, call: Call, told: Told, took_s: float) -> None:
    total = sum(told.brought.values())
    own = told.brought.get(OWN, 0)
    if own == total:
        span.update_name(span_names.OWN_TO_PREFILL)
    span.set_attributes(
        {
            "dualpath.objects": told.objects,
            "dualpath.bytes": total,
            "dualpath.own.bytes": own,
            "dualpath.relay.bytes": total - own,
            "dualpath.bandwidth_bytes_per_s": total / took_s,
            **{
                f"dualpath.relay.bytes.{name}": count
                for name, count in told.brought.items()
                if name != OWN and count
            },
        }
    )
    if call.request_id:
        span.set_attribute("dualpath.rid", call.request_id)
    reason = "not wanted any more" if call.given_up else told.reason
    if reason is not None:
        span.set_attribute("dualpath.reason", reason)
    if told.fallback is not None:
        span.set_attribute("dualpath.fallback.reason", told.fallback)
        span.set_attribute("error.type", "dualpath.fallback")
        span.set_status(Status(StatusCode.ERROR, told.fallback))
