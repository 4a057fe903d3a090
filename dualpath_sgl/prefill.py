"""The PE's side of a request.

A request comes here from SGLang's arrival path (`Scheduler._prefetch_kvcache`), is reported
once its stored prefix is known, waits as a prefetch operation for its plan, and is then split
over the peer lane and the store lane.  It leaves as an ordinary finished prefetch.

Its states are `PrefillState`.  Threads: `begin`, `matched`, `not_registered`, `revoked`, `forget` and `reset`
run on SGLang's scheduler thread, `hits_known` on its prefetch thread, `take_operation` and `start_overdue` on
its prefetch I/O thread, `on_plan` and `on_no_plan` on the control channel's, `_lanes_done` on a lane's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from dualpath_sgl.control.workload import Work
from dualpath_sgl.lanes.loads import Loads
from dualpath_sgl.lanes.page_load import PageLoad
from dualpath_sgl.lanes.peer_lanes import PeerLanes
from dualpath_sgl.lanes.store_lane import StoreLane
from dualpath_sgl.pools.prompt_hash import prompt_hash
from dualpath_sgl.request_state import PrefillState
from dualpath_sgl.room_reports import RoomReports, RoomRequest
from dualpath_sgl.spans.tracing import traceparent_of
from dualpath_sgl.threads import faults
from scheduler_svc.wire.protocol import Outcome, Plan

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import (
        HybridCacheController,
        PrefetchOperation,
    )

BEFORE_HOST_MEMORY = (PrefillState.REPORTED, PrefillState.PLANNED)
"""A load may begin, or none may come."""


@dataclass(eq=False, kw_only=True)
class _Request(RoomRequest):
    kv_only: bool
    """The model has no pools beside KV: only then can a DE's pages be all that it needs."""
    local_pages: int = 0
    state: PrefillState = PrefillState.ARRIVED
    """Changed with the side's lock held."""


class PrefillSide:
    def __init__(
        self,
        *,
        rank: int,
        page_size: int,
        reports: RoomReports,
        loads: Loads,
        store_lane: StoreLane,
        peer_lanes: PeerLanes,
        left: Callable[[], None],
    ) -> None:
        """`page_size` in tokens.  `left` is called when SGLang has finished with a request."""
        self._left = left
        self._rank = rank
        self._page_size = page_size
        self._reports = reports
        self._loads = loads
        self._store_lane = store_lane
        self._peer_lanes = peer_lanes
        self._by_rid: dict[str, _Request] = {}
        self._by_room: dict[int, _Request] = {}
        self._lock = threading.Lock()

    # -- SGLang's scheduler thread ------------------------------------------------------------

    def begin(self, req: Req, kv_only: bool = True) -> None:
        """A request arrives, or SGLang looks for its stored prefix once more.

        Continues in `hits_known`, on SGLang's prefetch thread, or in `not_registered`.
        """
        with self._lock:
            if req.rid in self._by_rid:
                return
            request = self._by_rid[req.rid] = _Request(
                room=req.bootstrap_room,
                rid=req.rid,
                prompt_tokens=len(req.origin_input_ids),
                prompt_hash=prompt_hash(req),
                traceparent=traceparent_of(req.time_stats),
                kv_only=kv_only,
            )
            if self._by_room.setdefault(request.room, request) is not request:
                # Its room is another request's (n > 1, a reused room): one plan cannot serve both.
                request.state = request.state.to(PrefillState.DONE)

    def matched(self, rid: str, matched_tokens: int) -> None:
        """SGLang holds `matched_tokens` of the prompt and queries the store for the rest.

        It does so again when it had no host memory for a planned load: the plan still stands.
        """
        request = self._by_rid.get(rid)
        if request is not None and request.state is PrefillState.ARRIVED:
            request.local_pages = matched_tokens // self._page_size

    def not_registered(self, rid: str, matched_tokens: int) -> None:
        """SGLang asks the store for nothing (prompt held already, or too short)."""
        request = self._by_rid.get(rid)
        if request is not None and request.state is PrefillState.ARRIVED:
            request.local_pages = matched_tokens // self._page_size
            self._report(request, 0)

    def holds(self, rid: str) -> bool:
        """Whether the request has come and not been finished."""
        return rid in self._by_rid

    def forget(self, rid: str, aborted: bool = False) -> None:
        """SGLang has finished with the request, or aborted it."""
        with self._lock:
            request = self._by_rid.pop(rid, None)
            if request is None:
                return
            if self._by_room.get(request.room) is request:
                del self._by_room[request.room]
        self._left()
        if request.state is PrefillState.WAITING:
            # SGLang frees the operation's memory on its last acknowledgement: the lanes give it.
            self._start(request)
        elif aborted:
            self._end_without_load(request, "aborted", Outcome.ABORTED)
        else:
            self._end_without_load(request, "no host memory", Outcome.FALLBACK)

    def revoked(self, rid: str, reason: str) -> None:
        """SGLang drops the prefetch before it had host memory.

        It may look at the store again, but only after the DE has admitted the request: the DE must
        not wait for a pull until then.
        """
        request = self._by_rid.get(rid)
        if request is not None:
            self._end_without_load(request, reason, Outcome.FALLBACK)

    def reset(self) -> None:
        """SGLang, idle, drops its cache or its storage: no load may wait for a plan any more."""
        for request in list(self._by_rid.values()):
            self._start(request)

    # -- SGLang's prefetch thread -------------------------------------------------------------

    def hits_known(self, operation: PrefetchOperation, hit_tokens: int, least_tokens: int) -> None:
        """All ranks agree that the store holds `hit_tokens` beyond the local prefix.

        SGLang loads `least_tokens` or more, and nothing else.  Continues in `on_plan` and in `take_operation`,
        whichever comes first.
        """
        request = self._by_rid.get(operation.request_id)
        if request is None:
            return
        # Pools beside KV are read with the KV, by whoever reads it.
        wanted = hit_tokens >= least_tokens and request.kv_only and not operation.pool_transfers
        self._report(request, hit_tokens // self._page_size if wanted else 0)

    # -- SGLang's prefetch I/O thread ---------------------------------------------------------

    def take_operation(self, controller: HybridCacheController, operation: PrefetchOperation) -> None:
        """A prefetch has host memory: its load starts, or waits for its plan.

        One that waits continues in `on_plan`, on the control channel's thread, or in `start_overdue`.
        """
        with self._lock:
            request = self._by_rid.get(operation.request_id)
            if request is None or operation.pool_transfers or request.state not in BEFORE_HOST_MEMORY:
                # Not this request's first look at the store: its room is planned, or closed, already.
                go_on = partial(self._loads.read_unplanned, controller, operation)
            else:
                load = request.page_load = self._loads.begin(
                    controller, operation, on_lanes_done=partial(self._lanes_done, request)
                )
                if request.state is PrefillState.REPORTED and self._plan_may_come(request, load):
                    request.state = request.state.to(PrefillState.WAITING)
                    return
                request.state = request.state.to(PrefillState.LOADING)
                go_on = partial(self._fill, request, load)
        go_on()

    def start_overdue(self) -> None:
        """Loads whose plan is overdue or cannot come start without it."""
        for request in list(self._by_rid.values()):
            if (
                request.state is PrefillState.WAITING
                and request.page_load is not None
                and not self._plan_may_come(request, request.page_load)
            ):
                self._start(request)

    def _plan_may_come(self, request: _Request, load: PageLoad) -> bool:
        return self._reports.why_no_plan(request) is None and not load.cancelled

    # -- the control channel's thread ---------------------------------------------------------

    def on_plan(self, plan: Plan) -> None:
        """The load starts if it has host memory; else in `take_operation`, once it has."""
        with self._lock:
            request = self._by_room.get(plan.room)
            if request is not None and request.plan is not None:
                return
            wanted = request is not None and request.state in (PrefillState.REPORTED, PrefillState.WAITING)
            if request is not None and wanted:
                request.plan, request.decided_ns = plan, time.time_ns()
                if request.state is PrefillState.REPORTED:
                    request.state = request.state.to(PrefillState.PLANNED)
        if request is not None and wanted:
            self._start(request)
        else:
            self._let_go(plan)  # it came too late

    def on_no_plan(self, room: int) -> None:
        """The scheduler refused the report: `start_overdue` stops waiting."""
        request = self._by_room.get(room)
        if request is not None:
            request.refused = True

    # -- any of them --------------------------------------------------------------------------

    def _report(self, request: _Request, hit_pages: int) -> None:
        """Tell the scheduler that `hit_pages` beyond the local ones are stored; only once."""
        with self._lock:
            if request.state is not PrefillState.ARRIVED or self._by_rid.get(request.rid) is not request:
                return  # reported, or forgotten meanwhile
            request.state = request.state.to(PrefillState.REPORTED)
            self._reports.report(request, request.local_pages, request.local_pages + hit_pages)
        if not hit_pages:
            self._end_without_load(request, None, Outcome.OK)

    def _start(self, request: _Request) -> None:
        """A load that waited for its plan waits no longer; of several threads the first one starts it."""
        with self._lock:
            load = request.page_load
            if request.state is not PrefillState.WAITING or load is None:
                return
            request.state = request.state.to(PrefillState.LOADING)
        self._fill(request, load)

    def _fill(self, request: _Request, load: PageLoad) -> None:
        """Hand the load's pages to the lanes; continues in `_lanes_done`, on a lane's thread."""
        if request.plan is None:
            request.fallback_reason = self._reports.why_no_plan(request) or "no plan in time"
            request.decided_ns = time.time_ns()
        try:
            forwarded = self._forward(request, load)
            if forwarded < load.pages:
                self._store_lane.submit(load, forwarded, load.pages)
        finally:
            load.close_part()

    def _forward(self, request: _Request, load: PageLoad) -> int:
        """Give the peer lane its share of `load`; how many pages, from the load's first one on."""
        plan = request.plan
        if plan is None or self._rank >= len(plan.decode_endpoints):
            return 0
        pages = min(max(0, plan.split_page - load.first_page), load.pages)
        if pages:
            try:
                endpoint = plan.decode_endpoints[self._rank]
                self._peer_lanes.submit(
                    endpoint, plan.decode_id, load, request.room, pages, request.prompt_hash
                )
            except Exception:
                faults.record("room %d: its pages come from the store, no peer lane", request.room)
                request.fallback_reason = "peer lane did not start"
                return 0
        return pages

    def _lanes_done(self, request: _Request, load: PageLoad) -> None:
        """Every page has landed or will not: say so, on the thread of the lane that let go last."""
        with self._lock:
            request.state = request.state.to(PrefillState.DONE)
        request.fallback_reason = load.fallback_reason or request.fallback_reason
        if load.cancelled:
            if request.rid not in self._by_rid:
                self._reports.done(request, Outcome.ABORTED)
                return
            if load.prefix < load.pages:
                expired = load.operation.deadline_expired
                request.fallback_reason = "prefetch deadline passed" if expired else "prefetch cut short"
        self._reports.done(request, Outcome.FALLBACK if request.fallback_reason else Outcome.OK)

    def _end_without_load(self, request: _Request, reason: str | None, outcome: Outcome) -> None:
        """A reported request gets no load: say so, and let its DE go."""
        with self._lock:
            if request.state not in BEFORE_HOST_MEMORY:
                return
            request.state = request.state.to(PrefillState.DONE)
            request.fallback_reason = reason
        self._reports.done(request, outcome)
        if request.plan is not None:
            self._let_go(request.plan)

    def _let_go(self, plan: Plan) -> None:
        """Nothing will be pulled: the DE need not hold what it has or reads for this room."""
        if plan.split_page <= plan.prefill_local_pages or self._rank >= len(plan.decode_endpoints):
            return
        try:
            self._peer_lanes.let_go(plan.decode_endpoints[self._rank], plan.decode_id, plan.room)
        except Exception:
            # The DE stops waiting by itself (DUALPATH_SUBSCRIBE_TIMEOUT_S).
            faults.record("room %d: its decode engine was not told to let go", plan.room)

    @property
    def held(self) -> int:
        """Requests that this PE has not let go of; 0 when idle."""
        return len(self._by_rid)

    def work_at_hand(self) -> Work:
        """Requests from their arrival until SGLang finishes with them, which is when their KV is sent."""
        requests = list(self._by_rid.values())
        return Work(len(requests), sum(request.prompt_tokens for request in requests))
