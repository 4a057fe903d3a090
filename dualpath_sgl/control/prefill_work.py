"""What a PE in relay mode has to do, and which rooms it has to tell of.

No plan and no lane of ours is on a request's way there, so this only looks: a request is known from SGLang's
arrival path to its end, its stored prefix from the prefetch thread's query.

`arrives`, `arrived`, `ended` and `look` are called on SGLang's scheduler thread, `hits_known` on its prefetch
thread, `work` from any.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from dualpath_sgl.control.drain_rate import RecentRate
from dualpath_sgl.spans.tracing import traceparent_of

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler

LOOK_S = 0.25
"""A quarter of a heartbeat's interval."""


class LoadAtHand(NamedTuple):
    """Of requests that the PE has not finished with."""

    sequences: int = 0
    tokens: int = 0
    """In their prompts."""
    to_read_tokens: int = 0
    """Stored, not held, and their read is not over."""
    ready_tokens: int = 0
    """To be computed, of requests that wait for their turn only."""
    compute_rate_tokens_per_s: float = 0.0


class Arrived(NamedTuple):
    """A request's stored prefix is known, or will not be asked for."""

    room: int
    prompt_tokens: int
    local_tokens: int
    """Held by SGLang's tree."""
    hit_tokens: int
    """Held or stored, from the prompt's start."""
    traceparent: str | None = None


@dataclass(eq=False)
class _Request:
    req: Req
    local_tokens: int = 0
    hit_tokens: int | None = None
    """Beyond the local ones; None while the store has not answered."""
    is_loading: bool = True
    is_told: bool = False

    @property
    def to_compute_tokens(self) -> int:
        return max(0, len(self.req.origin_input_ids) - self.local_tokens - (self.hit_tokens or 0))


class PrefillWork:
    def __init__(self, tell: Callable[[Arrived], None], left: Callable[[], None]) -> None:
        """`tell` is called once for each request, `left` when one has ended; on SGLang's scheduler thread."""
        self._tell = tell
        self._left = left
        self._by_rid: dict[str, _Request] = {}
        self._untold: dict[str, _Request] = {}
        self._looked_s = 0.0
        self._rate = RecentRate()
        self._measured_s = 0.0
        self._launched_tokens = 0
        """SGLang's count at the last look."""
        self._under_way_tokens = 0
        """Launched between the last two looks."""
        self._now = LoadAtHand()

    def arrives(self, req: Req) -> None:
        """SGLang is about to look for its stored prefix; it may do so again."""
        if req.rid not in self._by_rid:
            self._by_rid[req.rid] = self._untold[req.rid] = _Request(req)
            # At once: a heartbeat must count every request that was reported before it.
            self._change(1, req)

    def arrived(self, req: Req, tree: Any) -> None:
        """SGLang has asked the store, or has no reason to."""
        request = self._by_rid.get(req.rid)
        if request is None:
            return
        request.is_loading = _is_loading(tree, req)
        if not request.is_told:
            request.local_tokens = req.storage_prefetch_last_match_len or 0
            if not request.is_loading:
                self._tell_of(request)

    def hits_known(self, rid: str, hit_tokens: int) -> None:
        """The store has `hit_tokens` beyond what the tree holds."""
        request = self._by_rid.get(rid)
        if request is not None:
            request.hit_tokens = hit_tokens

    def ended(self, rid: str) -> None:
        self._untold.pop(rid, None)
        request = self._by_rid.pop(rid, None)
        if request is not None:
            self._change(-1, request.req)
            self._left()

    def look(self, scheduler: Scheduler, tree: Any) -> None:
        """Once an iteration of SGLang's scheduler loop."""
        now_s = time.monotonic()
        self._measure(scheduler, now_s)
        for request in list(self._untold.values()):
            if request.hit_tokens is not None or not _is_loading(tree, request.req):
                self._tell_of(request)
        if now_s - self._looked_s < LOOK_S:
            return
        self._looked_s = now_s
        for rid, request in list(self._by_rid.items()):
            # SGLang refuses a prompt that is too long for the device without a word to its cache.
            if request.req.finished():
                self.ended(rid)
            elif request.is_loading:
                request.is_loading = _is_loading(tree, request.req)
        self._count({req.rid for req in scheduler.waiting_queue})

    def work(self) -> LoadAtHand:
        """As of the last look, or the last arrival."""
        return self._now

    def _tell_of(self, request: _Request) -> None:
        request.is_told = True
        self._untold.pop(request.req.rid, None)
        hit_tokens = request.local_tokens + (request.hit_tokens or 0)
        self._tell(
            Arrived(
                request.req.bootstrap_room,
                len(request.req.origin_input_ids),
                request.local_tokens,
                hit_tokens,
                traceparent_of(request.req.time_stats),
            )
        )

    def _change(self, requests: int, req: Req) -> None:
        now = self._now
        tokens = now.tokens + requests * len(req.origin_input_ids)
        self._now = now._replace(sequences=now.sequences + requests, tokens=tokens)

    def _count(self, waiting: set[str]) -> None:
        """`waiting`: requests in SGLang's queue."""
        requests = list(self._by_rid.items())
        self._now = LoadAtHand(
            len(requests),
            sum(len(request.req.origin_input_ids) for _, request in requests),
            sum(request.hit_tokens or 0 for _, request in requests if request.is_loading),
            sum(
                request.to_compute_tokens
                for rid, request in requests
                if rid in waiting and not request.is_loading
            ),
            self._rate.per_s,
        )

    def _measure(self, scheduler: Scheduler, now_s: float) -> None:
        """A batch that was launched since the last look has been computed by now, or, where SGLang launches
        one while it waits for the one before, by the next look.
        """
        tokens, elapsed_s = scheduler.processed_tokens_counter, now_s - self._measured_s
        launched = tokens - self._launched_tokens
        computed = self._under_way_tokens if scheduler.enable_overlap else launched
        if computed:
            self._rate.add(computed, elapsed_s)
        self._measured_s, self._launched_tokens, self._under_way_tokens = now_s, tokens, launched


def _is_loading(tree: Any, req: Req) -> bool:
    """A prefetch of it is under way.  Trees without a store have none."""
    has_ongoing = getattr(tree, "has_ongoing_prefetch", None)
    return has_ongoing is not None and has_ongoing(req.cache_request_handle)
