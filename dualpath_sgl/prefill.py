"""The PE's side of a request.

A request comes here from SGLang's arrival path (`Scheduler._prefetch_kvcache`), is reported
once its stored prefix is known, waits as a prefetch operation for its plan, and is then split
over the peer lane and the store lane.  It leaves as an ordinary finished prefetch.

Threads: `begin`, `not_registered`, `revoked`, `forget` and `reset` run on SGLang's scheduler thread,
`hits_known` on its prefetch thread, `take` and `tick_io` on its prefetch I/O thread, `on_plan` and
`on_no_plan` on the control channel's.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dualpath_sgl.closing import close_room
from dualpath_sgl.lanes.page_load import PageLoad
from dualpath_sgl.lanes.peer_lane import PeerLane
from dualpath_sgl.lanes.peer_lanes import PeerLanes
from dualpath_sgl.pools.prompt_hash import prompt_hash
from dualpath_sgl.spans.tracing import traceparent_of
from dualpath_sgl.threads import faults
from scheduler_svc.wire.protocol import Outcome, Plan, Report, Role, Workload

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
    prompt_hash: str
    traceparent: str | None
    kv_only: bool
    """The model has no pools beside KV: only then can a DE's pages be all that it needs."""
    local_pages: int = 0
    reported_s: float | None = None
    refused: bool = False
    """The scheduler will send no plan."""
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
        self._waiting: dict[str, _Request] = {}
        """Those whose operation waits for a plan, by request id."""
        self._lanes = PeerLanes(self._new_lane)
        self._lock = threading.RLock()

    # -- SGLang's scheduler thread ------------------------------------------------------------

    def begin(self, req: Req, kv_only: bool = True) -> None:
        """A request arrives, or SGLang looks for its stored prefix once more."""
        with self._lock:
            if req.rid in self._by_rid:
                return
            request = self._by_rid[req.rid] = _Request(
                req.bootstrap_room,
                req.rid,
                len(req.origin_input_ids),
                prompt_hash(req),
                traceparent_of(req.time_stats),
                kv_only,
            )
            if self._by_room.setdefault(request.room, request) is not request:
                # Its room is another request's (n > 1, a reused room): one plan cannot serve both.
                request.reported_s, request.done = time.monotonic(), True

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

    def forget(self, rid: str, aborted: bool = False) -> None:
        """SGLang has finished with the request, or aborted it."""
        with self._lock:
            request = self._by_rid.pop(rid, None)
            if request is None:
                return
            if self._by_room.get(request.room) is request:
                del self._by_room[request.room]
            waiting = rid in self._waiting
        if waiting:
            # SGLang frees the operation's memory on its last acknowledgement: the lanes give it.
            self._start(request)
        elif aborted:
            self._give_up(request, "aborted", Outcome.ABORTED)
        else:
            self._give_up(request, "no host memory")

    def revoked(self, rid: str, reason: str) -> None:
        """SGLang drops the prefetch before it had host memory.

        It may look at the store again, but only after the DE has admitted the request: the DE must
        not wait for a pull until then.
        """
        request = self._by_rid.get(rid)
        if request is not None:
            self._give_up(request, reason)

    def reset(self) -> None:
        """SGLang, idle, drops its cache or its storage: no load may wait for a plan any more."""
        for request in list(self._waiting.values()):
            self._start(request)

    # -- SGLang's prefetch thread -------------------------------------------------------------

    def hits_known(self, operation: PrefetchOperation, hit_tokens: int) -> None:
        """All ranks agree that the store holds `hit_tokens` beyond the local prefix."""
        request = self._by_rid.get(operation.request_id)
        if request is None or request.reported_s is not None:
            return
        wanted = hit_tokens >= self._runtime.controller.prefetch_threshold
        # Pools beside KV are read with the KV, by whoever reads it.
        wanted = wanted and request.kv_only and not operation.pool_transfers
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
                open_loads=self._runtime.open_loads,
                page_bytes=self._runtime.page_bytes,
                on_lanes_done=lambda load: self._done(request),
            )
            if request.plan is None and self._may_come(request):
                self._waiting[request.rid] = request
                return
        self._start(request)

    def tick_io(self) -> None:
        """Stop waiting for plans that are overdue or cannot come."""
        for request in list(self._waiting.values()):
            if not self._may_come(request):
                self._start(request)

    def _may_come(self, request: _Request) -> bool:
        return (
            not request.refused
            and self._runtime.control.connected
            and time.monotonic() < request.reported_s + self._runtime.settings.plan_timeout_s
            and not (request.load is not None and request.load.cancelled)
        )

    # -- the control channel's thread ---------------------------------------------------------

    def on_plan(self, plan: Plan) -> None:
        with self._lock:
            request = self._by_room.get(plan.room)
            known = request is not None and request.plan is not None
            wanted = request is not None and not (known or request.started or request.done)
            if wanted:
                request.plan = plan
            ready = request is not None and request.rid in self._waiting
        if ready:
            self._start(request)
        elif not wanted and not known:
            self._let_go(plan)  # it came too late

    def on_no_plan(self, room: int) -> None:
        """The scheduler refused the report; the I/O thread stops waiting."""
        request = self._by_room.get(room)
        if request is not None:
            request.refused = True

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
                prompt_hash=request.prompt_hash,
                traceparent=request.traceparent,
            )
        )

    def _start(self, request: _Request) -> None:
        """Hand the load's pages to the lanes, once."""
        with self._lock:
            if request.started:
                return
            request.started = True
            self._waiting.pop(request.rid, None)
        load = request.load
        if request.plan is None:
            request.fallback_reason = self._why_no_plan(request)
        try:
            forwarded = self._forward(request, load)
            if forwarded < load.pages:
                self._runtime.store_lane.submit(load, forwarded, load.pages)
        finally:
            load.close_part()

    def _why_no_plan(self, request: _Request) -> str:
        if request.refused:
            return "scheduler refused the report"
        return "no plan in time" if self._runtime.control.connected else "scheduler away"

    def _forward(self, request: _Request, load: PageLoad) -> int:
        """Give the peer lane its share of `load`; how many pages, from the load's first one on."""
        plan = request.plan
        if plan is None or self._runtime.rank >= len(plan.decode_endpoints):
            return 0
        pages = min(max(0, plan.split_page - load.first_page), load.pages)
        if pages:
            try:
                endpoint = plan.decode_endpoints[self._runtime.rank]
                self._lanes.submit(endpoint, plan.decode_id, load, request.room, pages, request.prompt_hash)
            except Exception:
                faults.record("room %d: its pages come from the store, no peer lane", request.room)
                request.fallback_reason = "peer lane did not start"
                return 0
        return pages

    def _give_up(self, request: _Request, reason: str, outcome: Outcome = Outcome.FALLBACK) -> None:
        """A reported request gets no load: say so, and let its DE go."""
        with self._lock:
            if request.reported_s is None or request.done or request.load is not None:
                return
            request.done, request.fallback_reason = True, reason
        self._say_done(request, outcome)
        if request.plan is not None:
            self._let_go(request.plan)

    def _let_go(self, plan: Plan) -> None:
        """Nothing will be pulled: the DE need not hold what it has or reads for this room."""
        rank = self._runtime.rank
        if plan.split_page <= plan.prefill_local_pages or rank >= len(plan.decode_endpoints):
            return
        try:
            self._lanes.let_go(plan.decode_endpoints[rank], plan.decode_id, plan.room)
        except Exception:
            # The DE stops waiting by itself (DUALPATH_SUBSCRIBE_TIMEOUT_S).
            faults.record("room %d: its decode engine was not told to let go", plan.room)

    def _new_lane(self, endpoint: str, decode_id: str) -> PeerLane:
        """Raises scheduler_svc.wire.keys.KeyFileError when engines have keys and the DE's is not there."""
        keys = self._runtime.peer_keys
        return PeerLane(
            endpoint,
            self._runtime.forwarder,
            self._runtime.fingerprint,
            self._runtime.settings.peer_timeout_s,
            self._on_missing,
            keys.towards(decode_id) if keys else None,
        )

    def rename_layout(self, fingerprint: str) -> None:
        """Lanes ask for pages of this layout from now on."""
        self._lanes.rename_layout(fingerprint)

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
        """Nothing more will be loaded for the request's report."""
        request.done = True
        load = request.load
        if load is not None and load.cancelled:
            if request.rid not in self._by_rid:
                self._say_done(request, Outcome.ABORTED)
                return
            if load.prefix < load.pages:
                expired = load.operation.deadline_expired
                request.fallback_reason = "prefetch deadline passed" if expired else "prefetch cut short"
        self._say_done(request, Outcome.FALLBACK if request.fallback_reason else Outcome.OK)

    def _say_done(self, request: _Request, outcome: Outcome) -> None:
        close_room(
            self._runtime,
            request.room,
            request.traceparent,
            request.plan,
            request.load,
            outcome,
            request.fallback_reason,
        )

    @property
    def held(self) -> int:
        """Requests that this PE has not let go of; 0 when idle."""
        return len(self._by_rid)

    def load(self) -> Workload:
        # From their arrival until SGLang finishes with them, which is when their KV is sent.
        requests = list(self._by_rid.values())
        return Workload(
            sequences=len(requests),
            tokens=sum(request.prompt_tokens for request in requests),
            device_free_tokens=self._runtime.device_free_tokens,
            **self._runtime.storage_load(),
        )
