"""The DE's side of a request.

A request comes here when it enters SGLang's `DecodePreallocQueue`, before any device memory is
reserved for it.  It is reported with the pages this DE holds, gets its plan, offers the PE what
the PE misses, and starts its share of the storage read.  It may be admitted (patch 0001) once
its share has landed in the host tree: SGLang then finds it as an ordinary host hit, promises it
to the PE as `decode_prefix_len`, and restores it.

A read that takes too long does not hold the request back any longer: it goes on, for the PE, while
SGLang admits the request with what the host tree has.

Everything runs on SGLang's scheduler thread except `on_plan` and `on_no_plan` (control channel),
`take` (prefetch I/O thread) and the callbacks of loads and rooms, which only fill queues.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dualpath_sgl.closing import close_room
from dualpath_sgl.control.decode_work import DecodeWork
from dualpath_sgl.lanes.page_load import PageLoad
from dualpath_sgl.pools.host_tree import HostPrefix, held_on_host
from dualpath_sgl.pools.layout import page_blocks
from dualpath_sgl.pools.prompt_hash import prompt_hash
from dualpath_sgl.restore import RestoreGuard
from dualpath_sgl.spans.tracing import traceparent_of
from dualpath_sgl.threads import faults
from scheduler_svc.wire.protocol import Outcome, Plan, Report, Role, Workload

if TYPE_CHECKING:
    from sglang.srt.disaggregation.decode import DecodePreallocQueue, DecodeRequest
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import (
        HybridCacheController,
        PrefetchOperation,
    )

    from dualpath_sgl.runtime import Runtime

logger = logging.getLogger(__name__)

TICKS_A_VOTE = 64
"""With several ranks, how many of SGLang's scheduler iterations pass between votes on slow reads."""


def longest_hold_s() -> float:
    """How long a request may wait for its read: half of what the PE, waiting for it, bears."""
    from sglang.srt.environ import envs

    return envs.SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT.get() / 2


@dataclass(eq=False)
class _Request:
    req: Req
    room: int
    traceparent: str | None
    reported_s: float
    prompt_hash: str
    plan: Plan | None = None
    settled: bool = False
    """The plan is carried out or given up: SGLang may admit the request."""
    loading: bool = False
    load: PageLoad | None = None
    fallback_reason: str | None = None


class DecodeSide:
    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._requests: dict[str, _Request] = {}
        self._rooms: dict[int, _Request] = {}
        """Whose room it is: reported, and still queued."""
        self._plans: dict[int, Plan] = {}
        self._loading_rooms: set[int] = set()
        """Until SGLang has the load's last acknowledgement, which may be long after the request left."""
        self._refused: set[int] = set()
        """Rooms that the scheduler will send no plan for."""
        self._late: dict[str, _Request] = {}
        """Admitted while their read goes on, by request id."""
        self._ticks = 0
        self._longest_hold_s = longest_hold_s()
        self._unlocks: deque[Callable[[], None]] = deque()
        self.restores = RestoreGuard(runtime)
        self.work = DecodeWork()

    # -- called by hooks ----------------------------------------------------------------------

    def add(self, queue: DecodePreallocQueue, req: Req) -> None:
        """A request entered the queue: report what this DE holds of its prompt."""
        if req.rid in self._requests:
            return
        request = _Request(
            req,
            req.bootstrap_room,
            traceparent_of(req.time_stats),
            time.monotonic(),
            prompt_hash(req),
        )
        self._requests[req.rid] = request
        if self._is_taken(request.room):
            # Its room is another request's (n > 1, a reused room): one plan cannot serve both.
            request.settled = True
            return
        self._rooms[request.room] = request
        held = held_on_host(queue.tree_cache, req)
        self._runtime.control.send(
            Report(
                room=request.room,
                engine_id=self._runtime.settings.engine_id,
                role=Role.DECODE,
                rank=self._runtime.rank,
                prompt_tokens=len(req.origin_input_ids),
                local_pages=held.tokens // self._runtime.page_size,
                prompt_hash=request.prompt_hash,
                traceparent=request.traceparent,
            )
        )

    def _is_taken(self, room: int) -> bool:
        """Whether an earlier request still publishes into `room`, or may."""
        return room in self._rooms or room in self._loading_rooms or self._runtime.server.is_open(room)

    def admits(self, decode_req: DecodeRequest) -> bool:
        """Whether SGLang may reserve device memory now; a dictionary look-up."""
        request = self._requests.get(decode_req.req.rid)
        return request is None or request.settled

    def tick(self, queue: DecodePreallocQueue) -> None:
        """Advance every queued request; called once per scheduler iteration, never waits."""
        self._unlock()
        self._follow_late(queue)
        if not self._requests:
            return
        queued = {decode_req.req.rid for decode_req in queue.queue}
        for request in [request for rid, request in self._requests.items() if rid not in queued]:
            self._leave(queue, request)
        waiting = [r for r in self._requests.values() if not r.settled and not r.loading]
        for request, decided in zip(waiting, self._decided(queue, waiting), strict=True):
            if decided:
                self._step(self._decide, queue, request)
        loading = [request for request in self._requests.values() if request.loading and not request.settled]
        for request in loading:
            self._step(self._follow, queue, request)
        self._stop_holding(queue, [request for request in loading if not request.settled])

    def reset(self) -> None:
        """SGLang drops its whole cache (it is idle): nothing may be served or stay locked after."""
        self._runtime.server.close_all()
        self._unlock()
        self.restores.reset()
        for request in self._requests.values():
            if not request.settled:  # it left SGLang's queue after the last tick
                self._report_done(request, Outcome.ABORTED)
        self._requests.clear()
        self._rooms.clear()
        self._plans.clear()
        self._refused.clear()
        self._late.clear()

    @property
    def held(self) -> int:
        """Requests, rooms, pins and promises that this DE has not let go of; 0 when idle."""
        rooms = self._runtime.server.open_rooms
        return len(self._requests) + len(self._late) + rooms + len(self._unlocks) + self.restores.held

    def _unlock(self) -> None:
        while self._unlocks:
            self._unlocks.popleft()()

    # -- one request --------------------------------------------------------------------------

    def _decided(self, queue: DecodePreallocQueue, waiting: list[_Request]) -> list[bool]:
        """Which requests have their plan, or do without one; the same on every rank.

        A plan is taken up once all ranks have it; as soon as one rank gives up, all do.
        """
        for request in waiting:
            request.plan = self._plans.get(request.room)
            if request.plan is None:
                request.fallback_reason = self._out_of_patience(request)
        if waiting and self._runtime.tp_size > 1:
            has_plan = [int(request.plan is not None) for request in waiting]
            gave_up = [int(request.fallback_reason is not None) for request in waiting]
            state = torch.tensor([has_plan, [1 - flag for flag in gave_up]])
            torch.distributed.all_reduce(state, torch.distributed.ReduceOp.MIN, queue.gloo_group)
            for request, planned, patient in zip(waiting, *state.tolist(), strict=True):
                if not patient:
                    request.plan = None
                    request.fallback_reason = request.fallback_reason or "another rank has no plan"
                elif not planned:
                    request.plan = None
        return [request.plan is not None or request.fallback_reason is not None for request in waiting]

    def _out_of_patience(self, request: _Request) -> str | None:
        if request.room in self._refused:
            return "scheduler refused the report"
        if not self._runtime.control.connected:
            return "scheduler away"
        if time.monotonic() > request.reported_s + self._runtime.settings.plan_timeout_s:
            return "no plan in time"
        return None

    def _step(
        self,
        step: Callable[[DecodePreallocQueue, _Request], None],
        queue: DecodePreallocQueue,
        request: _Request,
    ) -> None:
        """An exception ends DualPath's part in this request, and no other's."""
        try:
            step(queue, request)
        except Exception as error:
            faults.record("room %d goes on without DualPath", request.room)
            self._runtime.server.close(request.room)
            if not request.settled:
                self._settle(request, f"{type(error).__name__} in the decode engine")

    def _decide(self, queue: DecodePreallocQueue, request: _Request) -> None:
        self._plans.pop(request.room, None)
        self._refused.discard(request.room)
        if request.plan is None:
            self._settle(request, request.fallback_reason)
        else:
            self._carry_out(queue, request, request.plan)

    def _follow(self, queue: DecodePreallocQueue, request: _Request) -> None:
        """Admit the request once SGLang has its pages, or has dropped their prefetch."""
        handle = request.req.cache_request_handle
        self._renew(request)
        if not queue.tree_cache.check_prefetch_progress(handle):
            return
        queue.tree_cache.pop_prefetch_loaded_tokens(handle)
        load, reason = request.load, None
        if load is None:
            reason = "storage read revoked"
            self._runtime.server.end(request.room, reason)
        elif load.first_page + load.prefix < request.plan.split_page:
            reason = (
                "prefetch deadline passed" if load.operation.deadline_expired else "storage read fell short"
            )
        self._settle(request, reason)

    def _renew(self, request: _Request) -> None:
        if request.load is None or request.load.lanes_open:
            self._runtime.server.renew(request.room)

    def _stop_holding(self, queue: DecodePreallocQueue, loading: list[_Request]) -> None:
        """Admit requests whose read is so slow that SGLang would fail them for waiting longer.

        All ranks decide alike.
        """
        self._ticks += 1
        if not loading:
            return
        since_s = time.monotonic() - self._longest_hold_s
        slow = [request.reported_s < since_s for request in loading]
        if self._runtime.tp_size > 1:
            if self._ticks % TICKS_A_VOTE:
                return
            votes = torch.tensor(slow, dtype=torch.int)
            torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX, queue.gloo_group)
            slow = votes.tolist()
        for request, give_way in zip(loading, slow, strict=True):
            if give_way:
                self._late[request.req.rid] = request
                self._settle(request, "storage read too slow")

    def _follow_late(self, queue: DecodePreallocQueue) -> None:
        for rid, request in list(self._late.items()):
            handle = request.req.cache_request_handle
            if queue.tree_cache.has_ongoing_prefetch(handle):
                self._renew(request)
            else:
                queue.tree_cache.pop_prefetch_loaded_tokens(handle)
                del self._late[rid]

    def _carry_out(self, queue: DecodePreallocQueue, request: _Request, plan: Plan) -> None:
        page_size, server = self._runtime.page_size, self._runtime.server
        held = held_on_host(queue.tree_cache, request.req)
        held_pages = held.tokens // page_size
        if plan.split_page <= plan.prefill_local_pages and plan.split_page <= held_pages:
            self._settle(request)  # the PE needs nothing and nothing is to be read
            return
        offers = plan.prefill_local_pages < plan.split_page
        if offers:
            server.open(request.room, plan.prefill_local_pages, request.prompt_hash)
            self._offer_held(queue, request, held, plan)
        if held_pages >= plan.split_page:
            server.end(request.room)
            self._settle(request)
            return
        if self._start_read(queue, request, held, plan.split_page):
            request.loading = True
        else:
            server.end(request.room, "decode engine cannot prefetch")
            self._settle(request, "prefetch refused")

    def _offer_held(
        self, queue: DecodePreallocQueue, request: _Request, held: HostPrefix, plan: Plan
    ) -> None:
        """Pin and publish pages `[L_P, min(L_D, x))`, which need no storage read at all."""
        page_size = self._runtime.page_size
        first = plan.prefill_local_pages * page_size
        end = min(held.tokens, plan.split_page * page_size)
        if first >= end:
            return
        pages, sizes = page_blocks(self._runtime.pool, held.host_indices()[first:end])
        unlock = held.lock(queue.tree_cache)
        self._runtime.server.publish(request.room, pages, sizes, unpin=lambda: self._unlocks.append(unlock))

    def _start_read(
        self, queue: DecodePreallocQueue, request: _Request, held: HostPrefix, split_page: int
    ) -> bool:
        """Start SGLang's prefetch of pages `[L_D, x)`; False when SGLang declines it."""
        if held.tokens != held.matched_tokens:
            return False  # the deepest matched node has no host copy yet: nothing to append to
        req, tree = request.req, queue.tree_cache
        end = split_page * self._runtime.page_size
        pass_keys = tree.hicache_storage_pass_prefix_keys
        tree.prefetch_from_storage(
            req.cache_request_handle,
            held.node,
            # An EAGLE tree keys pairs of tokens: the last page's key needs one token more.
            req.origin_input_ids[held.tokens : end + int(tree.tree_core.is_eagle)],
            tree.get_last_hash_value(held.node),
            tree.get_prefix_hash_values(held.node) if pass_keys else None,
            matched_prefix_tokens=req.origin_input_ids[: held.tokens],
            extra_key=req.extra_key,
            cache_salt=req.cache_salt,
            storage_hit_end=end,
        )
        return tree.has_ongoing_prefetch(req.cache_request_handle)

    def _settle(self, request: _Request, fallback_reason: str | None = None) -> None:
        request.settled = True
        request.fallback_reason = request.fallback_reason or fallback_reason
        if fallback_reason is not None:
            logger.info("DualPath: room %d goes on without a DE read: %s", request.room, fallback_reason)
        self._report_done(request, Outcome.FALLBACK if request.fallback_reason else Outcome.OK)

    def _leave(self, queue: DecodePreallocQueue, request: _Request) -> None:
        """The request was admitted, or aborted while it waited here."""
        if request.settled:
            self.work.admitted(request.req)
        del self._requests[request.req.rid]
        if self._rooms.get(request.room) is request:
            del self._rooms[request.room]
            self._plans.pop(request.room, None)
            self._refused.discard(request.room)
        if request.settled:
            return
        from sglang.srt.mem_cache.base_prefix_cache import CacheRequestOutcome

        # First nobody may count on the pages, then SGLang may free them.
        self._runtime.server.close(request.room)
        queue.tree_cache.finish(request.req.cache_request_handle, CacheRequestOutcome.ABORT)
        self._report_done(request, Outcome.ABORTED)

    def _report_done(self, request: _Request, outcome: Outcome) -> None:
        close_room(
            self._runtime,
            request.room,
            request.traceparent,
            request.plan,
            request.load,
            outcome,
            request.fallback_reason,
        )

    # -- other threads ------------------------------------------------------------------------

    def on_plan(self, plan: Plan) -> None:
        if plan.room in self._rooms:  # else: its request has left, aborted or out of patience
            self._plans[plan.room] = plan

    def on_no_plan(self, room: int) -> None:
        if room in self._rooms:
            self._refused.add(room)

    # -- SGLang takes or frees a prefetch's pages -------------------------------------------------

    def give_back(self, rid: str) -> None:
        """SGLang is about to take, or free, the pages that its prefetch for `rid` has loaded.

        Whatever made it do so (all arrived, a deadline, an abort): first nobody may count on them.
        """
        request = self._requests.get(rid) or self._late.get(rid)
        if request is not None:
            self._runtime.server.close(request.room)

    def take(self, controller: HybridCacheController, operation: PrefetchOperation) -> None:
        """The prefetch has host memory: read it, publishing pages as they land."""
        request = self._requests.get(operation.request_id)
        if request is None or not request.loading:
            self._runtime.load_from_store(controller, operation)
            return
        request.load = load = PageLoad(
            controller,
            operation,
            open_loads=self._runtime.open_loads,
            page_bytes=self._runtime.page_bytes,
            on_prefix=lambda load, before: self._publish(request, load, before),
            on_lanes_done=lambda load: self._end(request, load),
            hold=lambda acknowledge: self._runtime.server.when_closed(
                request.room, lambda: self._hand_over(request.room, acknowledge)
            ),
        )
        self._loading_rooms.add(request.room)
        self._runtime.store_lane.submit(load, 0, load.pages)
        load.close_part()

    def _hand_over(self, room: int, acknowledge: Callable[[], None]) -> None:
        acknowledge()
        self._loading_rooms.discard(room)

    def _publish(self, request: _Request, load: PageLoad, before: int) -> None:
        skip = max(0, request.plan.prefill_local_pages - load.first_page)
        first = max(before, skip)
        if first < load.prefix:
            pages, sizes = page_blocks(self._runtime.pool, load.host_indices(first, load.prefix))
            self._runtime.server.publish(request.room, pages, sizes)

    def _end(self, request: _Request, load: PageLoad) -> None:
        whole = load.first_page + load.prefix >= request.plan.split_page
        if not whole:
            request.fallback_reason = "storage read fell short"
        self._runtime.server.end(request.room, None if whole else "storage read fell short")

    def load(self) -> Workload:
        # Copied in this order: a request admitted meanwhile is in both, never in neither.
        queued = {rid: len(request.req.origin_input_ids) for rid, request in self._requests.copy().items()}
        sequences, tokens = self.work.with_queued(queued)
        return Workload(
            sequences=sequences,
            tokens=tokens,
            # Queued requests have no device memory reserved yet.
            device_free_tokens=max(0, self._runtime.device_free_tokens - sum(queued.values())),
            **self._runtime.storage_load(),
        )
