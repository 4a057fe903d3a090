"""Keeps a DE's promise: host pages it promised to restore stay until they are on the device.

SGLang tells the PE `decode_prefix_len` when the DE reserves device memory, and loads the
promised host pages back later.  Evicted in between they fail the request.  A host lock from the
promise to the load-back (which takes its own) closes the gap.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from opentelemetry.trace import Tracer

from dualpath_sgl.pools.host_tree import held_on_host
from dualpath_sgl.spans.tracing import record_span, traceparent_of

if TYPE_CHECKING:
    from sglang.srt.disaggregation.decode import DecodeRequest
    from sglang.srt.disaggregation.decode_hicache_mixin import DecodePrefixMatch
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache


class RestoreGuard:
    """Runs on SGLang's scheduler thread."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        # By request id: requests with one room (n > 1, a room that a client chose) have a promise each.
        self._unlocks: dict[str, Callable[[], None]] = {}
        self._begun_ns: dict[str, int] = {}

    def promise(self, tree: UnifiedRadixCache, req: Req, match: DecodePrefixMatch | None) -> None:
        """The DE is about to promise `match` to the PE."""
        if match is not None and match.l2_host_hit_length > 0:
            self._unlock(req.rid)
            self._unlocks[req.rid] = held_on_host(tree, req).lock(tree)

    def load_back_queued(self, request: DecodeRequest) -> None:
        """SGLang's load-back has taken over the pages."""
        self._unlock(request.req.rid)
        self._begun_ns.setdefault(request.req.rid, time.time_ns())

    def give_up(self, request: DecodeRequest) -> None:
        """The request failed or was aborted before its restore."""
        self._unlock(request.req.rid)
        self._begun_ns.pop(request.req.rid, None)

    def look(self, requests: Iterable[DecodeRequest]) -> None:
        """SGLang has just looked which copies are over; what it calls READY is on the device."""
        if not self._begun_ns:
            return
        for request in requests:
            if request.req.rid in self._begun_ns and request.hicache_restore_status.name == "READY":
                self._restored(request)

    def _restored(self, request: DecodeRequest) -> None:
        begun_ns = self._begun_ns.pop(request.req.rid, None)
        if begun_ns is not None:
            record_span(
                self._tracer,
                "restore",
                traceparent_of(request.req.time_stats),
                begun_ns,
                time.time_ns(),
                {
                    "dualpath.room": str(request.req.bootstrap_room),
                    "dualpath.tokens": request.prefix_match.restore_token_count,
                },
            )

    def reset(self) -> None:
        """SGLang drops its whole cache: no promise may keep a part of it."""
        for unlock in self._unlocks.values():
            unlock()
        self._unlocks.clear()
        self._begun_ns.clear()

    @property
    def held(self) -> int:
        """Promises not yet loaded back."""
        return len(self._unlocks)

    def _unlock(self, rid: str) -> None:
        unlock = self._unlocks.pop(rid, None)
        if unlock is not None:
            unlock()
