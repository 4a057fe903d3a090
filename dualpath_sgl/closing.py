"""How an engine rank closes its part of a room: one `Done` to the scheduler, one span per lane used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dualpath_sgl.spans.tracing import record_lane
from dualpath_sgl.threads import faults
from scheduler_svc.wire.protocol import Done, Outcome, Plan

if TYPE_CHECKING:
    from dualpath_sgl.lanes.page_load import PageLoad
    from dualpath_sgl.runtime import Runtime


def close_room(
    runtime: Runtime,
    room: int,
    traceparent: str | None,
    plan: Plan | None,
    load: PageLoad | None,
    outcome: Outcome,
    fallback_reason: str | None,
) -> None:
    """Report what became of `room` on this rank; `load` is None when nothing was read or forwarded."""
    clocks = load.clocks if load is not None else []
    runtime.control.send(
        Done(
            room=room,
            engine_id=runtime.settings.engine_id,
            role=runtime.role,
            rank=runtime.rank,
            outcome=outcome,
            fallback_reason=fallback_reason,
            loaded_pages=load.prefix if load is not None else 0,
            lanes=tuple(clock.record() for clock in clocks),
        )
    )
    attributes = {"dualpath.room": room, "dualpath.side": runtime.role.value}
    if plan is not None:
        attributes |= {"dualpath.path": plan.path.value, "dualpath.split.pages": plan.split_page}
    if fallback_reason:
        attributes["dualpath.fallback.reason"] = fallback_reason
    for clock in clocks:
        try:
            record_lane(runtime.tracer, clock, traceparent, attributes)
        except Exception:
            faults.record("room %d: one of its spans is missing", room)
