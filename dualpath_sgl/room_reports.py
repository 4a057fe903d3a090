"""What an engine rank tells the scheduler about a room: a `Report` when its request comes, `Done` when it is over.

`Done` also ends the room's part in the trace: a span `load` with what became of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opentelemetry.trace import Tracer

from dualpath_sgl.control.channel import ControlChannel
from dualpath_sgl.spans.request_span import RequestSpans
from dualpath_sgl.spans.tracing import is_sampled, record_load, traceparent_of
from dualpath_sgl.threads import faults
from scheduler_svc.wire.protocol import Done, Outcome, Path, Plan, Report, Role

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from dualpath_sgl.lanes.page_load import LaneWork, PageLoad

OnOver = Callable[[str, Path | None, Outcome, str | None, Sequence["LaneWork"]], None]
"""`(rid, planned path, outcome, fallback reason, what lanes did)`."""


@dataclass(eq=False, kw_only=True)
class RoomRequest:
    """What both sides know of a request."""

    room: int
    rid: str
    prompt_tokens: int
    prompt_hash: str
    traceparent: str | None
    reported_s: float = 0.0
    """Monotonic time of the report."""
    reported_ns: int = 0
    """The same since 1970."""
    decided_ns: int = 0
    """When its plan was taken up, or none was waited for any more; since 1970."""
    refused: bool = False
    """The scheduler will send no plan."""
    plan: Plan | None = None
    page_load: PageLoad | None = None
    """None when nothing was read or forwarded."""
    fallback_reason: str | None = None


class RoomReports:
    """Safe from any thread."""

    def __init__(
        self,
        *,
        engine_id: str,
        role: Role,
        rank: int,
        control: ControlChannel,
        plan_timeout_s: float,
        tracer: Tracer,
        on_over: OnOver | None = None,
        requests: RequestSpans | None = None,
    ) -> None:
        """`on_over` is called for every room, by whoever says that it is done.  `requests`: of the rank that
        exports whole requests.
        """
        self._engine_id = engine_id
        self._role = role
        self._rank = rank
        self._control = control
        self._plan_timeout_s = plan_timeout_s
        self._tracer = tracer
        self._on_over = on_over
        self._requests = requests

    def report(self, request: RoomRequest, local_pages: int, hit_pages: int | None = None) -> None:
        """The answer comes to the side's `on_plan` or `on_no_plan`, on the control channel's thread.

        `local_pages`: held here, from the prompt's start.  `hit_pages`: the stored prefix, which a PE knows.
        """
        request.reported_s, request.reported_ns = time.monotonic(), time.time_ns()
        self._control.send(
            Report(
                room=request.room,
                engine_id=self._engine_id,
                role=self._role,
                rank=self._rank,
                prompt_tokens=request.prompt_tokens,
                local_pages=local_pages,
                hit_pages=hit_pages,
                prompt_hash=request.prompt_hash,
                traceparent=request.traceparent,
                tell_loaded=self._requests is not None and is_sampled(request.traceparent),
            )
        )

    def arrived(self, req: Req) -> None:
        """A request is here, and begins in its trace."""
        if self._requests is not None:
            self._requests.begin(req, traceparent_of(req.time_stats))

    def why_no_plan(self, request: RoomRequest) -> str | None:
        """Why a reported request need not wait for its plan any longer; None while it may come."""
        if request.refused:
            return "scheduler refused the report"
        if not self._control.connected:
            return "scheduler away"
        if time.monotonic() > request.reported_s + self._plan_timeout_s:
            return "no plan in time"
        return None

    def done(self, request: RoomRequest, outcome: Outcome) -> None:
        """What became of the request's room on this rank."""
        load = request.page_load
        lane_work = load.lane_work if load is not None else []
        self._control.send(
            Done(
                room=request.room,
                engine_id=self._engine_id,
                role=self._role,
                rank=self._rank,
                outcome=outcome,
                fallback_reason=request.fallback_reason,
                loaded_pages=load.prefix if load is not None else 0,
                lanes=tuple(work.record() for work in lane_work),
            )
        )
        if self._on_over is not None:
            path = request.plan.path if request.plan is not None else None
            try:
                self._on_over(request.rid, path, outcome, request.fallback_reason, lane_work)
            except Exception:
                faults.record("room %d is not counted", request.room)
        try:
            record_load(self._tracer, request, self._role, outcome)
            if self._requests is not None:
                self._requests.decided(request.room, request.plan, request.fallback_reason)
                if outcome is Outcome.ABORTED:
                    self._requests.end(request.room)
        except Exception:
            faults.record("room %d: its spans are missing", request.room)
