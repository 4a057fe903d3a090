"""Spans of the load paths, children of SGLang's own request span on the same engine.

load                        report -> done; every fallback is here, whether a lane had begun or not
  plan wait                 report -> plan, or until nobody waited for it any more
  store to prefill wait     asked for -> the first call that moves pages
  store to prefill          first call -> end of the last one; its calls are events
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from opentelemetry.context import Context
from opentelemetry.propagate import inject
from opentelemetry.trace import Span, Status, StatusCode, Tracer, set_span_in_context

from scheduler_svc.telemetry import span_names
from scheduler_svc.telemetry.tracing import context_from
from scheduler_svc.wire.protocol import Outcome, Plan, Role

if TYPE_CHECKING:
    from sglang.srt.observability.req_time_stats import SchedulerReqTimeStats

    from dualpath_sgl.lanes.page_load import LaneWork, PageLoad

Attributes = Mapping[str, str | int | float | bool]
WAYS = {
    (Role.PREFILL, "store"): span_names.STORE_TO_PREFILL,
    (Role.DECODE, "store"): span_names.STORE_TO_DECODE,
    (Role.PREFILL, "peer"): span_names.DECODE_TO_PREFILL,
}


class Loading(Protocol):
    """A request of a room (`room_reports.RoomRequest`)."""

    room: int
    traceparent: str | None
    reported_ns: int
    decided_ns: int
    plan: Plan | None
    page_load: PageLoad | None
    fallback_reason: str | None


def traceparent_of(time_stats: SchedulerReqTimeStats) -> str | None:
    """The W3C traceparent of SGLang's request span; None when SGLang does not trace the request."""
    trace = time_stats.trace_ctx
    context = getattr(trace, "root_span_context", None)
    if not trace.tracing_enable or context is None:
        return None
    carrier: dict[str, str] = {}
    inject(carrier, context)
    return carrier.get("traceparent")


def is_sampled(traceparent: str | None) -> bool:
    return traceparent is not None and bool(int(traceparent[-2:], 16) & 1)


def record_span(
    tracer: Tracer,
    name: str,
    traceparent: str | None,
    begun_ns: int,
    ended_ns: int,
    attributes: Attributes,
) -> None:
    """A span below `traceparent`, or nothing where that says that the trace is not recorded."""
    span = tracer.start_span(
        name, context=context_from(traceparent), start_time=begun_ns, attributes=dict(attributes)
    )
    span.end(end_time=max(begun_ns, ended_ns))


def record_load(tracer: Tracer, request: Loading, side: Role, outcome: Outcome) -> None:
    """What a side did for a room that is done now: one `load` span with one of each way below it."""
    load = request.page_load
    lanes = load.lane_work if load is not None else []
    if not is_sampled(request.traceparent) or (outcome is Outcome.OK and not lanes and not request.plan):
        return
    done_ns = time.time_ns()
    span = tracer.start_span(
        span_names.LOAD,
        context=context_from(request.traceparent),
        start_time=request.reported_ns or done_ns,
        attributes=_of_room(request, side, outcome),
    )
    if request.fallback_reason:
        span.set_attributes(
            {"dualpath.fallback.reason": request.fallback_reason, "error.type": "dualpath.fallback"}
        )
        span.set_status(Status(StatusCode.ERROR, request.fallback_reason))
    if request.reported_ns:
        _child(tracer, span, span_names.PLAN_WAIT, request.reported_ns).end(request.decided_ns or done_ns)
    for work in lanes:
        _record_lane(tracer, span, WAYS[side, work.lane], work, done_ns)
    span.end(max(done_ns, *(work.ended_ns for work in lanes)) if lanes else done_ns)


def _of_room(request: Loading, side: Role, outcome: Outcome) -> Attributes:
    load, plan = request.page_load, request.plan
    attributes: dict[str, str | int | float | bool] = {
        "dualpath.room": str(request.room),
        "dualpath.side": side.value,
        "dualpath.outcome": outcome.value,
    }
    if plan is not None:
        attributes |= {
            "dualpath.path": plan.shown_path,
            "dualpath.split.pages": plan.split_page,
            "dualpath.hit.pages": plan.hit_pages,
            "dualpath.local.pages": (
                plan.prefill_local_pages if side is Role.PREFILL else plan.decode_local_pages
            ),
        }
    if load is not None:
        attributes |= {
            "dualpath.asked.pages": load.pages,
            "dualpath.loaded.pages": load.prefix,
            "dualpath.bytes": sum(work.bytes for work in load.lane_work),
        }
    return attributes


def _record_lane(tracer: Tracer, parent: Span, name: str, work: LaneWork, done_ns: int) -> None:
    waited_for = _child(tracer, parent, f"{name} {span_names.WAIT}", work.queued_ns)
    waited_for.end(max(work.queued_ns, work.begun_ns or done_ns))
    if not work.begun_ns:
        return
    ended_ns = max(work.begun_ns, work.ended_ns)
    span = _child(tracer, parent, name, work.begun_ns)
    span.set_attributes(
        {
            "dualpath.lane": work.lane,
            "dualpath.bytes": work.bytes,
            "dualpath.transfers": work.transfers,
            **({"dualpath.blocks": work.blocks} if work.blocks else {}),
            "dualpath.pages.first": work.first_page,
            "dualpath.pages.end": work.end_page,
            "dualpath.pages.asked_end": work.asked_end,
            "dualpath.queue_wait_s": max(0, work.begun_ns - work.queued_ns) / 1e9,
            "dualpath.busy_s": work.busy_ns / 1e9,
            "dualpath.source_wait_s": max(0, ended_ns - work.begun_ns - work.busy_ns) / 1e9,
            "dualpath.bandwidth_bytes_per_s": work.bytes / (max(work.busy_ns, 1) / 1e9),
        }
    )
    for batch in work.batches:
        took_s = max(0, batch.ended_ns - batch.begun_ns) / 1e9
        span.add_event("batch", {"dualpath.bytes": batch.bytes, "dualpath.busy_s": took_s}, batch.ended_ns)
    if work.end_page < work.asked_end:
        missing = f"pages {work.end_page} to {work.asked_end} did not come this way"
        span.set_status(Status(StatusCode.ERROR, missing))
    span.end(ended_ns)


def _child(tracer: Tracer, parent: Span, name: str, begun_ns: int) -> Span:
    return tracer.start_span(name, context=set_span_in_context(parent, Context()), start_time=begun_ns)
