"""The PE's side of a request.

A request comes here from SGLang's arrival path (`Scheduler._prefetch_kvcache`), is reported
once its stored prefix is known, waits as a prefetch operation for its plan, and is then split
over the peer lane and the store lane.  It leaves as an ordinary finished prefetch.

Threads: `begin`/`not_registered`/`forget` run on SGLang's scheduler thread, `hits_known` on its
prefetch thread, `take`/`tick_io` on its prefetch I/O thread, `on_plan` on the control channel's.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dualpath_sgl.closing import close_room
from dualpath_sgl.page_load import PageLoad
from dualpath_sgl.peer_lane import PeerLane
from dualpath_sgl.tracing import traceparent_of
from scheduler_svc.protocol import Load, Outcome, Plan, Report, Role

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import (
        HybridCacheController,
        PrefetchOperation,
    )

    from dualpath_sgl.runtime import Runtime

logger = logging.getLogger(__name__)


@dataclass
class _Request:
    room: int
    rid: str
    prompt_tokens: int
    traceparent: str | None
    local_pages: int = 0
    reported_s: float | None = None
    plan: Plan | None = None
    load: PageLoad | None = None
    started: bool = False
    done: bool = False
    fallback_reason: str | None = None


class PrefillSide:
    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._by_rid: dict[str, _Request] = {}
        self._by_room: dict[int, _Request] = {}
        self._waiting: set[str] = set()
        """Requests whose operation waits for a plan."""
        self._lanes: dict[str, PeerLane] = {}
        self._lock = threading.RLock()

    # -- SGLang's scheduler thread ------------------------------------------------------------

    def begin(self, req: Req) -> None:
        """A request arrives, or SGLang looks for its stored prefix once more."""
        with self._lock:
            if req.rid in self._by_rid:
                return
            request = _Request(
                req.bootstrap_room, req.rid, len(req.origin_input_ids), traceparent_of(req.time_stats)
            )
            self._by_rid[req.rid] = self._by_room[request.room] = request

    def matched(self, rid: str, matched_tokens: int) -> None:
        """SGLang holds `matched_tokens` of the prompt and queries the store for the rest.

        It does so again when it had no host memory for a planned load: the plan still stands.
        """
        request = self._by_rid.get(rid)
        if request is not None and not request.started:
            request.local_pages = matched_tokens // self._runtime.page_size

    def not_registered(self, rid: str, matched_tokens: int) -> None:
        """SGLang asks the store for nothing (prompt held already, or too short)."""
        request = self._by_rid.get(rid)
        if request is None or request.reported_s is not None:
            return
        request.local_pages = matched_tokens // self._runtime.page_size
        self._report(request, request.local_pages)
        self._done(request)

    def holds(self, rid: str) -> bool:
        """Whether the request has come and not been finished."""
        return rid in self._by_rid

    def forget(self, rid: str) -> None:
        """SGLang has finished with the request, or aborted it."""
        with self._lock:
            request = self._by_rid.pop(rid, None)
            if request is None:
                return
            self._by_room.pop(request.room, None)
            waiting = rid in self._waiting
        if waiting:
            # SGLang frees the operation's memory on its last acknowledgement: the lanes give it.
            self._start(request)
        elif request.reported_s is not None and not request.done and request.load is None:
            request.fallback_reason = "no host memory"
            self._done(request)
            self._let_go(request)

    # -- SGLang's prefetch thread -------------------------------------------------------------

    def hits_known(self, operation: PrefetchOperation, hit_tokens: int) -> None:
        """All ranks agree that the store holds `hit_tokens` beyond the local prefix."""
        request = self._by_rid.get(operation.request_id)
        if request is None or request.reported_s is not None:
            return
        wanted = hit_tokens >= self._runtime.controller.prefetch_threshold
        hit_pages = hit_tokens // self._runtime.page_size if wanted else 0
        self._report(request, request.local_pages + hit_pages)
        if not hit_pages:
            self._done(request)

    # -- SGLang's prefetch I/O thread ---------------------------------------------------------

    def take(self, controller: HybridCacheController, operation: PrefetchOperation) -> None:
        """An operation has host memory: wait for its plan, or start."""
        request = self._by_rid.get(operation.request_id)
        if request is None or request.done or request.load is not None or operation.pool_transfers:
            # Not this request's first look at the store: its room is planned, or closed, already.
            self._runtime.load_from_store(controller, operation)
            return
        with self._lock:
            request.load = PageLoad(
                controller,
                operation,
                first_page=request.local_pages,
                page_bytes=self._runtime.page_bytes,
                on_lanes_done=lambda load: self._done(request),
            )
            if request.plan is None and self._may_come(request):
                self._waiting.add(request.rid)
                return
        self._start(request)

    def tick_io(self) -> None:
        """Stop waiting for plans that are overdue or cannot come."""
        if not self._waiting:
            return
        with self._lock:
            waiting = [self._by_rid[rid] for rid in self._waiting if rid in self._by_rid]
            overdue = [request for request in waiting if not self._may_come(request)]
        for request in overdue:
            self._start(request)

    def _may_come(self, request: _Request) -> bool:
        return (
            self._runtime.control.connected
            and time.monotonic() < request.reported_s + self._runtime.settings.plan_timeout_s
            and not (request.load is not None and request.load.cancelled)
        )

    # -- the control channel's thread ---------------------------------------------------------

    def on_plan(self, plan: Plan) -> None:
        request = self._by_room.get(plan.room)
        if request is None:
            return
        with self._lock:
            if request.plan is None and not request.started:
                request.plan = plan
            ready = request.rid in self._waiting
        if ready:
            self._start(request)

    # -- any of them --------------------------------------------------------------------------

    def _report(self, request: _Request, hit_pages: int) -> None:
        request.reported_s = time.monotonic()
        self._runtime.control.send(
            Report(
                room=request.room,
                engine_id=self._runtime.settings.engine_id,
                role=Role.PREFILL,
                rank=self._runtime.rank,
                prompt_tokens=request.prompt_tokens,
                local_pages=request.local_pages,
                hit_pages=hit_pages,
                traceparent=request.traceparent,
            )
        )

    def _start(self, request: _Request) -> None:
        """Hand the load's pages to the lanes, once."""
        with self._lock:
            if request.started:
                return
            request.started = True
            self._waiting.discard(request.rid)
        load, plan = request.load, request.plan
        forwarded = 0
        if plan is None:
            request.fallback_reason = (
                "no plan in time" if self._runtime.control.connected else "scheduler away"
            )
        elif self._runtime.rank < len(plan.decode_endpoints):
            forwarded = min(max(0, plan.split_page - load.first_page), load.pages)
        if forwarded:
            lane = self._lane(plan.decode_endpoints[self._runtime.rank])
            lane.submit(load, request.room, forwarded)
        if forwarded < load.pages:
            self._runtime.store_lane.submit(load, forwarded, load.pages)
        load.close_part()

    def _let_go(self, request: _Request) -> None:
        """Nothing will be pulled: the DE need not hold what it reads for this room."""
        plan = request.plan
        if plan is not None and self._runtime.rank < len(plan.decode_endpoints):
            self._lane(plan.decode_endpoints[self._runtime.rank]).let_go(request.room)

    def _lane(self, endpoint: str) -> PeerLane:
        with self._lock:
            lane = self._lanes.get(endpoint)
            if lane is None:
                lane = self._lanes[endpoint] = PeerLane(
                    endpoint,
                    self._runtime.forwarder,
                    self._runtime.fingerprint,
                    self._runtime.settings.peer_timeout_s,
                    self._on_missing,
                )
                lane.start()
            return lane

    def rename_layout(self, fingerprint: str) -> None:
        """Lanes ask for pages of this layout from now on."""
        with self._lock:
            for lane in self._lanes.values():
                lane.fingerprint = fingerprint

    def _on_missing(self, load: PageLoad, first: int, end: int, reason: str) -> None:
        """The DE did not deliver: the store does."""
        logger.warning(
            "DualPath: pages [%d, %d) of request %s come from the store instead: %s",
            load.first_page + first,
            load.first_page + end,
            load.operation.request_id,
            reason,
        )
        request = self._by_rid.get(load.operation.request_id)
        if request is not None:
            request.fallback_reason = reason
        self._runtime.store_lane.submit(load, first, end)

    def _done(self, request: _Request) -> None:
        request.done = True
        load = request.load
        outcome = Outcome.FALLBACK if request.fallback_reason else Outcome.OK
        if load is not None and load.cancelled:
            outcome = Outcome.ABORTED
        close_room(
            self._runtime,
            request.room,
            request.traceparent,
            request.plan,
            load,
            outcome,
            request.fallback_reason,
        )

    @property
    def held(self) -> int:
        """Requests that this PE has not let go of; 0 when idle."""
        return len(self._by_rid)

    def load(self) -> Load:
        # From their arrival until SGLang finishes with them, which is when their KV is sent.
        requests = list(self._by_rid.values())
        return Load(
            sequences=len(requests),
            tokens=sum(request.prompt_tokens for request in requests),
            device_free_tokens=self._runtime.device_free_tokens,
            **self._runtime.storage_load(),
        )
