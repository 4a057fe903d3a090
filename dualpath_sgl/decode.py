"""The DE's side of a request.

A request comes here when it enters SGLang's `DecodePreallocQueue`, before any device memory is
reserved for it.  It is reported with the pages this DE holds, gets its plan, offers the PE what
the PE misses, and starts its share of the storage read.  It may be admitted (patch 0001) once
its share has landed in the host tree: SGLang then finds it as an ordinary host hit, promises it
to the PE as `decode_prefix_len`, and restores it.

A read that takes too long does not hold the request back any longer: it goes on, for the PE, while
SGLang admits the request with what the host tree has.

Its states are `DecodeState`.  Everything runs on SGLang's scheduler thread except `on_plan` and `on_no_plan`
(control channel), `take_operation` (prefetch I/O thread) and what a load calls (store lane).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from dualpath_sgl.control.decode_work import DecodeWork
from dualpath_sgl.control.workload import Work
from dualpath_sgl.lanes.loads import Loads
from dualpath_sgl.lanes.page_load import PageLoad
from dualpath_sgl.lanes.page_server import PageServer
from dualpath_sgl.lanes.store_lane import StoreLane
from dualpath_sgl.pools.host_tree import HostPrefix, held_on_host
from dualpath_sgl.pools.layout import page_blocks
from dualpath_sgl.pools.prompt_hash import prompt_hash
from dualpath_sgl.request_state import DecodeState
from dualpath_sgl.restore import RestoreGuard
from dualpath_sgl.room_reports import RoomReports, RoomRequest
from dualpath_sgl.spans.tracing import traceparent_of
from dualpath_sgl.threads import faults
from scheduler_svc.wire.protocol import Outcome, Plan

if TYPE_CHECKING:
    from sglang.srt.disaggregation.decode import DecodePreallocQueue, DecodeRequest
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import (
        HybridCacheController,
        PrefetchOperation,
    )

logger = logging.getLogger(__name__)

TICKS_A_VOTE = 64
"""With several ranks, how many of SGLang's scheduler iterations pass between votes on slow reads."""
READING = (DecodeState.LOADING, DecodeState.LATE)


def longest_hold_s() -> float:
    """How long a request may wait for its read: half of what the PE, waiting for it, bears."""
    from sglang.srt.environ import envs

    return envs.SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT.get() / 2


@dataclass(eq=False, kw_only=True)
class _Request(RoomRequest):
    """`plan` is what all ranks go by: None until they agree on one."""

    req: Req
    state: DecodeState = DecodeState.ARRIVED
    received: Plan | None = None
    """The plan as it came to this rank."""


class DecodeSide:
    def __init__(
        self,
        *,
        tp_size: int,
        pool: Any,
        reports: RoomReports,
        loads: Loads,
        store_lane: StoreLane,
        server: PageServer,
        restores: RestoreGuard,
        left: Callable[[], None],
    ) -> None:
        """`pool`: SGLang's KV host pool.  `left` is called when requests have ended."""
        self._tp_size = tp_size
        self._pool = pool
        self._page_size: int = pool.page_size
        self._reports = reports
        self._loads = loads
        self._store_lane = store_lane
        self._server = server
        self.restores = restores
        self.work = DecodeWork(left)
        self._requests: dict[str, _Request] = {}
        """Until SGLang admits them, by request id."""
        self._rooms: dict[int, _Request] = {}
        """Whose room it is: reported, and still queued."""
        self._loading_rooms: set[int] = set()
        """Until SGLang has the load's last acknowledgement, which may be long after the request left."""
        self._late: dict[str, _Request] = {}
        """All that are LATE, admitted or not, by request id."""
        self._ticks = 0
        self._longest_hold_s = longest_hold_s()
        self._unlocks: deque[Callable[[], None]] = deque()
        """Host locks of withdrawn pages; undone on SGLang's scheduler thread."""

    # -- called by hooks ----------------------------------------------------------------------

    def add(self, queue: DecodePreallocQueue, req: Req) -> None:
        """A request entered the queue: report what this DE holds of its prompt.

        Continues in `tick`: the plan comes to `on_plan`, on the control channel's thread.
        """
        if req.rid in self._requests:
            return
        self._reports.arrived(req)
        request = self._requests[req.rid] = _Request(
            room=req.bootstrap_room,
            rid=req.rid,
            prompt_tokens=len(req.origin_input_ids),
            prompt_hash=prompt_hash(req),
            traceparent=traceparent_of(req.time_stats),
            req=req,
        )
        if self._is_taken(request.room):
            # Its room is another request's (n > 1, a reused room): one plan cannot serve both.
            request.state = request.state.to(DecodeState.SETTLED)
            return
        self._rooms[request.room] = request
        request.state = request.state.to(DecodeState.REPORTED)
        self._reports.report(request, held_on_host(queue.tree_cache, req).tokens // self._page_size)

    def _is_taken(self, room: int) -> bool:
        """Whether an earlier request still publishes into `room`, or may."""
        return room in self._rooms or room in self._loading_rooms or self._server.offers(room)

    def admits(self, decode_req: DecodeRequest) -> bool:
        """Whether SGLang may reserve device memory now; a dictionary look-up."""
        request = self._requests.get(decode_req.req.rid)
        return request is None or request.state.admissible

    def tick(self, queue: DecodePreallocQueue) -> None:
        """Advance every queued request; called once per scheduler iteration, never waits."""
        self._unlock()
        self._follow_late(queue)
        if not self._requests:
            return
        queued = {decode_req.req.rid for decode_req in queue.queue}
        for request in [request for rid, request in self._requests.items() if rid not in queued]:
            self._leave(queue, request)
        waiting = self._in_state(DecodeState.REPORTED)
        for request, decided in zip(waiting, self._decided(queue, waiting), strict=True):
            if decided:
                request.decided_ns = time.time_ns()
                self._step(self._decide, queue, request)
        for request in self._in_state(DecodeState.LOADING):
            self._step(self._follow, queue, request)
        self._stop_holding(queue, self._in_state(DecodeState.LOADING))

    def _in_state(self, state: DecodeState) -> list[_Request]:
        return [request for request in self._requests.values() if request.state is state]

    def reset(self) -> None:
        """SGLang drops its whole cache (it is idle): nothing may be served or stay locked after."""
        self._server.withdraw_all()
        self._unlock()
        self.restores.reset()
        for request in self._requests.values():
            if not request.state.admissible:  # it left SGLang's queue after the last tick
                self._abort(request)
        self._requests.clear()
        self._rooms.clear()
        self._late.clear()

    @property
    def held(self) -> int:
        """Requests, rooms, pins and promises that this DE has not let go of; 0 when idle."""
        rooms = self._server.offered_rooms
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
            request.plan = request.received
            if request.plan is None:
                request.fallback_reason = self._reports.why_no_plan(request)
        if waiting and self._tp_size > 1:
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
            self._server.withdraw(request.room)
            if not request.state.admissible:
                self._settle(request, f"{type(error).__name__} in the decode engine")

    def _decide(self, queue: DecodePreallocQueue, request: _Request) -> None:
        if request.plan is None:
            self._settle(request, request.fallback_reason)
        else:
            request.state = request.state.to(DecodeState.PLANNED)
            self._carry_out(queue, request, request.plan)

    def _follow(self, queue: DecodePreallocQueue, request: _Request) -> None:
        """Admit the request once SGLang has its pages, or has dropped their prefetch."""
        handle = request.req.cache_request_handle
        self._renew(request)
        if not queue.tree_cache.check_prefetch_progress(handle):
            return
        queue.tree_cache.pop_prefetch_loaded_tokens(handle)
        load, reason = request.page_load, None
        if load is None:
            reason = "storage read revoked"
            self._server.end(request.room, reason)
        elif not _brought(request.plan, load):
            reason = (
                "prefetch deadline passed" if load.operation.deadline_expired else "storage read fell short"
            )
        self._settle(request, reason)

    def _renew(self, request: _Request) -> None:
        if request.page_load is None or request.page_load.lanes_open:
            self._server.renew(request.room)

    def _stop_holding(self, queue: DecodePreallocQueue, loading: list[_Request]) -> None:
        """Admit requests whose read is so slow that SGLang would fail them for waiting longer.

        All ranks decide alike.
        """
        self._ticks += 1
        if not loading:
            return
        since_s = time.monotonic() - self._longest_hold_s
        slow = [request.reported_s < since_s for request in loading]
        if self._tp_size > 1:
            if self._ticks % TICKS_A_VOTE:
                return
            votes = torch.tensor(slow, dtype=torch.int)
            torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX, queue.gloo_group)
            slow = votes.tolist()
        for request, give_way in zip(loading, slow, strict=True):
            if give_way:
                self._late[request.rid] = request
                self._settle(request, "storage read too slow", DecodeState.LATE)

    def _follow_late(self, queue: DecodePreallocQueue) -> None:
        for rid, request in list(self._late.items()):
            handle = request.req.cache_request_handle
            if queue.tree_cache.has_ongoing_prefetch(handle):
                self._renew(request)
            else:
                queue.tree_cache.pop_prefetch_loaded_tokens(handle)
                request.state = request.state.to(DecodeState.SETTLED)
                del self._late[rid]

    def _carry_out(self, queue: DecodePreallocQueue, request: _Request, plan: Plan) -> None:
        held = held_on_host(queue.tree_cache, request.req)
        held_pages = held.tokens // self._page_size
        if plan.split_page <= plan.prefill_local_pages and plan.split_page <= held_pages:
            self._settle(request)  # the PE needs nothing and nothing is to be read
            return
        if plan.prefill_local_pages < plan.split_page:
            self._server.offer(request.room, plan.prefill_local_pages, request.prompt_hash)
            self._publish_held(queue, request, held, plan)
        if held_pages >= plan.split_page:
            self._server.end(request.room)
            self._settle(request)
        elif self._start_read(queue, request, held, plan.split_page):
            request.state = request.state.to(DecodeState.LOADING)
        else:
            self._server.end(request.room, "decode engine cannot prefetch")
            self._settle(request, "prefetch refused")

    def _publish_held(
        self, queue: DecodePreallocQueue, request: _Request, held: HostPrefix, plan: Plan
    ) -> None:
        """Pin and publish pages `[L_P, min(L_D, x))`, which need no storage read at all."""
        first = plan.prefill_local_pages * self._page_size
        end = min(held.tokens, plan.split_page * self._page_size)
        if first >= end:
            return
        pages, sizes = page_blocks(self._pool, held.host_indices()[first:end])
        unlock = held.lock(queue.tree_cache)
        self._server.publish(request.room, pages, sizes, unpin=partial(self._unlocks.append, unlock))

    def _start_read(
        self, queue: DecodePreallocQueue, request: _Request, held: HostPrefix, split_page: int
    ) -> bool:
        """Start SGLang's prefetch of pages `[L_D, x)`; False when SGLang declines it.

        Continues in `take_operation`, on the prefetch I/O thread, once SGLang gave it host memory.
        """
        if held.tokens != held.matched_tokens:
            return False  # the deepest matched node has no host copy yet: nothing to append to
        req, tree = request.req, queue.tree_cache
        end = split_page * self._page_size
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

    def _settle(
        self,
        request: _Request,
        fallback_reason: str | None = None,
        state: DecodeState = DecodeState.SETTLED,
    ) -> None:
        request.state = request.state.to(state)
        request.fallback_reason = request.fallback_reason or fallback_reason
        if fallback_reason is not None:
            logger.info("DualPath: room %d goes on without a DE read: %s", request.room, fallback_reason)
        self._reports.done(request, Outcome.FALLBACK if request.fallback_reason else Outcome.OK)

    def _leave(self, queue: DecodePreallocQueue, request: _Request) -> None:
        """The request was admitted, or aborted while it waited here."""
        is_admitted = request.state.admissible
        if is_admitted:
            self.work.admitted(request.req)
        del self._requests[request.rid]
        if self._rooms.get(request.room) is request:
            del self._rooms[request.room]
        if is_admitted:
            return
        from sglang.srt.mem_cache.base_prefix_cache import CacheRequestOutcome

        # First nobody may count on the pages, then SGLang may free them.
        self._server.withdraw(request.room)
        queue.tree_cache.finish(request.req.cache_request_handle, CacheRequestOutcome.ABORT)
        self._abort(request)

    def _abort(self, request: _Request) -> None:
        request.state = request.state.to(DecodeState.ABORTED)
        self._reports.done(request, Outcome.ABORTED)

    # -- the control channel's thread ---------------------------------------------------------

    def on_plan(self, plan: Plan) -> None:
        """The plan is taken up by `tick`, on SGLang's scheduler thread."""
        request = self._rooms.get(plan.room)
        if request is not None:  # else it has left, aborted or out of patience
            request.received = plan

    def on_no_plan(self, room: int) -> None:
        """The scheduler refused the report: `tick` lets the request go on without a plan."""
        request = self._rooms.get(room)
        if request is not None:
            request.refused = True

    # -- SGLang takes or frees a prefetch's pages (its scheduler thread) -------------------------

    def give_back(self, rid: str) -> None:
        """SGLang is about to take, or free, the pages that its prefetch for `rid` has loaded.

        Whatever made it do so (all arrived, a deadline, an abort): first nobody may count on them.
        """
        request = self._requests.get(rid) or self._late.get(rid)
        if request is not None:
            self._server.withdraw(request.room)

    # -- SGLang's prefetch I/O thread ---------------------------------------------------------

    def take_operation(self, controller: HybridCacheController, operation: PrefetchOperation) -> None:
        """The prefetch has host memory: read it from the store.

        Continues in `_publish`, `_end` and `_hold`, on the store lane's thread, and in `_follow`, on SGLang's
        scheduler thread, once SGLang has the load's acknowledgements.
        """
        request = self._requests.get(operation.request_id)
        plan = request.plan if request is not None else None
        if request is None or plan is None or request.state not in READING:
            self._loads.read_unplanned(controller, operation)
            return
        load = request.page_load = self._loads.begin(
            controller,
            operation,
            on_prefix=partial(self._publish, plan),
            on_lanes_done=partial(self._end, request),
            hold=partial(self._hold, request.room),
        )
        self._loading_rooms.add(request.room)
        self._store_lane.submit(load, 0, load.pages)
        load.close_part()

    # -- the store lane's thread, called by a load ------------------------------------------------

    def _publish(self, plan: Plan, load: PageLoad, before: int) -> None:
        """Pages `[before, load.prefix)` have landed: the PE gets those that it misses."""
        skip = max(0, plan.prefill_local_pages - load.first_page)
        first = max(before, skip)
        if first < load.prefix:
            pages, sizes = page_blocks(self._pool, load.host_indices(first, load.prefix))
            self._server.publish(plan.room, pages, sizes)

    def _end(self, request: _Request, load: PageLoad) -> None:
        """No further page will land."""
        reason = None if _brought(request.plan, load) else "storage read fell short"
        request.fallback_reason = reason or request.fallback_reason
        self._server.end(request.room, reason)

    def _hold(self, room: int, load: PageLoad) -> None:
        """SGLang gets the pages back in `_hand_over`, once no PE may count on them; on whatever thread."""
        self._server.when_withdrawn(room, partial(self._hand_over, room, load))

    def _hand_over(self, room: int, load: PageLoad) -> None:
        load.acknowledge()
        self._loading_rooms.discard(room)

    # -- any thread -------------------------------------------------------------------------------

    def work_at_hand(self) -> Work:
        # Copied in this order: a request admitted meanwhile is in both, never in neither.
        queued = {rid: request.prompt_tokens for rid, request in self._requests.copy().items()}
        sequences, tokens = self.work.with_queued(queued)
        return Work(sequences, tokens, queued_tokens=sum(queued.values()))


def _brought(plan: Plan | None, load: PageLoad) -> bool:
    """Whether the DE's host pool has every page of its share."""
    return plan is not None and load.first_page + load.prefix >= plan.split_page
