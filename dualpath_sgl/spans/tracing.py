"""Spans of the load paths, children of SGLang's own request span on the same engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from opentelemetry.propagate import inject
from opentelemetry.trace import Tracer

from scheduler_svc.telemetry.tracing import context_from

if TYPE_CHECKING:
    from sglang.srt.observability.req_time_stats import SchedulerReqTimeStats

    from dualpath_sgl.lanes.page_load import LaneWork

SPAN_OF_LANE = {"store": "storage.read", "peer": "forward"}


def traceparent_of(time_stats: SchedulerReqTimeStats) -> str | None:
    """The W3C traceparent of SGLang's request span; None when SGLang does not trace the request."""
    trace = time_stats.trace_ctx
    context = getattr(trace, "root_span_context", None)
    if not trace.tracing_enable or context is None:
        return None
    carrier: dict[str, str] = {}
    inject(carrier, context)
    return carrier.get("traceparent")


def record_span(
    tracer: Tracer,
    name: str,
    traceparent: str | None,
    begun_ns: int,
    ended_ns: int,
    attributes: Mapping[str, str | int | float | bool],
) -> None:
    span = tracer.start_span(
        name, context=context_from(traceparent), start_time=begun_ns, attributes=dict(attributes)
    )
    span.end(end_time=max(begun_ns, ended_ns))


def record_lane(
    tracer: Tracer,
    work: LaneWork,
    traceparent: str | None,
    attributes: Mapping[str, str | int | float | bool],
) -> None:
    """One `storage.read` or `forward` span; queue wait is an attribute, not part of its length."""
    if not work.begun_ns:
        return
    busy_s = max(work.ended_ns - work.begun_ns, 1) / 1e9
    record_span(
        tracer,
        SPAN_OF_LANE[work.lane],
        traceparent,
        work.begun_ns,
        work.ended_ns,
        {
            "dualpath.lane": work.lane,
            "dualpath.bytes": work.bytes,
            "dualpath.transfers": work.transfers,
            **({"dualpath.blocks": work.blocks} if work.blocks else {}),
            "dualpath.pages.first": work.first_page,
            "dualpath.pages.end": work.end_page,
            "dualpath.queue_wait_s": max(0, work.begun_ns - work.queued_ns) / 1e9,
            "dualpath.bandwidth_bytes_per_s": work.bytes / busy_s,
            **attributes,
        },
    )
