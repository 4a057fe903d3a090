"""One SGLang prefetch operation on its way into the host pool, filled by one or two lanes.

SGLang counts a prefetch by its contiguous prefix, so pages may land in any order but only the
prefix is acknowledged.  The final acknowledgement hands the pages to SGLang's scheduler thread;
it is given only after every lane has let go of the operation's memory, and without those pages
into which a read that hangs may still write.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from dualpath_sgl.lanes.open_loads import OpenLoads
from dualpath_sgl.threads import faults
from scheduler_svc.wire.protocol import LaneRecord

if TYPE_CHECKING:
    from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import (
        HybridCacheController,
        PrefetchOperation,
    )


Lane = Literal["store", "peer"]
MOST_BATCHES = 100
"""Of a load's calls that a trace shows one by one."""


class Batch(NamedTuple):
    """One call that moved pages, in nanoseconds since 1970."""

    begun_ns: int
    ended_ns: int
    bytes: int


class LaneWork:
    """What one lane did for one load, and when; becomes its `LaneRecord`."""

    def __init__(
        self, lane: Lane, first_page: int, asked_end: int, on_moved: Callable[[Lane, int], None] | None = None
    ) -> None:
        """It shall bring prompt pages `[first_page, asked_end)`.

        `on_moved(lane, bytes)` is called as they arrive, whether they will count or not.
        """
        self.lane = lane
        self._on_moved = on_moved
        self.first_page = first_page
        self.asked_end = asked_end
        self.end_page = first_page
        self.bytes = 0
        self.transfers = 0
        """Calls that moved pages."""
        self.blocks = 0
        """Contiguous blocks that a forward's calls were made of."""
        self.queued_ns = time.time_ns()
        self.begun_ns = 0
        self.ended_ns = 0
        self.busy_ns = 0
        """In calls that move pages; the rest of its time it waited for them to be there."""
        self.batches: list[Batch] = []
        """The first MOST_BATCHES."""
        self._call_ns = 0

    def begin(self) -> None:
        """A call that moves pages begins."""
        self._call_ns = time.time_ns()
        self.begun_ns = self.begun_ns or self._call_ns

    def moved(self, pages: int, byte_count: int) -> None:
        """The call has ended."""
        self.end_page += pages
        self.bytes += byte_count
        self.transfers += byte_count > 0
        if self._on_moved is not None:
            self._on_moved(self.lane, byte_count)
        self.ended_ns = time.time_ns()
        self.busy_ns += max(0, self.ended_ns - self._call_ns)
        if len(self.batches) < MOST_BATCHES:
            self.batches.append(Batch(self._call_ns, self.ended_ns, byte_count))

    def void(self) -> None:
        """Nothing of what was moved counts."""
        self.end_page, self.bytes = self.first_page, 0
        self.ended_ns = time.time_ns()

    def record(self) -> LaneRecord:
        begun = self.begun_ns or time.time_ns()
        return LaneRecord(
            lane=self.lane,
            first_page=self.first_page,
            end_page=self.end_page,
            bytes=self.bytes,
            queue_s=max(0, begun - self.queued_ns) / 1e9,
            busy_s=max(0, self.ended_ns - begun) / 1e9,
        )


class PageLoad:
    """Pages `[0, pages)` of one operation; page 0 is prompt page `first_page`.

    Where it begins is the operation's own word: SGLang may move it until there is host memory.
    Lanes work between `open_part` and `close_part` and call `land` for pages that are whole.  The load calls
    its owner, on the lane's thread:

        on_prefix(load, before)   pages `[before, load.prefix)` are whole; inside `land`
        on_lanes_done(load)       every lane has let go; once
        hold(load)                right after it, instead of `acknowledge()`: the owner calls that later.
                                  A DE keeps pages so that a PE still reads
    """

    def __init__(
        self,
        controller: HybridCacheController,
        operation: PrefetchOperation,
        *,
        open_loads: OpenLoads,
        page_bytes: int,
        on_prefix: Callable[[PageLoad, int], None] | None = None,
        on_lanes_done: Callable[[PageLoad], None] | None = None,
        hold: Callable[[PageLoad], None] | None = None,
    ) -> None:
        self.controller = controller
        self.operation = operation
        self.first_page = operation.storage_start // controller.page_size
        self.page_bytes = page_bytes
        self.pages = len(operation.hash_value)
        self.prefix = 0
        """Pages landed without a gap."""
        self.lane_work: list[LaneWork] = []
        self.fallback_reason: str | None = None
        """Why another source than the planned one brings some of the pages."""
        self._landed = bytearray(self.pages)
        self._host_indices = operation.host_indices
        self._withheld = bytearray(self.pages)
        self._open_parts = 1  # whoever submits parts closes this one after the last
        self._lock = threading.Lock()
        self._on_prefix = on_prefix
        self._on_lanes_done = on_lanes_done
        self._hold = hold
        self._stopped = False
        self._acknowledged = False
        """From here on the operation is SGLang's."""
        self._given_back = False
        """SGLang has been told."""
        self._open_loads = open_loads
        open_loads.add(self)

    @property
    def cancelled(self) -> bool:
        """SGLang wants no more pages (abort, prefetch time-out, or it stops its storage threads)."""
        return self._stopped or self.operation.is_terminated()

    def stop(self) -> None:
        """No lane begins another transfer."""
        self._stopped = True

    @property
    def lanes_open(self) -> bool:
        return self._open_parts > 0

    def host_indices(self, first: int, end: int) -> torch.Tensor:
        page_size = self.controller.page_size
        return self._host_indices[first * page_size : end * page_size]

    def withhold(self, first: int, end: int) -> Callable[[], None]:
        """Pages `[first, end)` may still be written into: the load will end without them.

        None of them may land.  SGLang gets them back when the result is called, on any thread, once;
        until then this load is open (OpenLoads).
        """
        with self._lock:
            self._set_withheld(first, end, True)
        return lambda: self._give_back(first, end)

    def _set_withheld(self, first: int, end: int, withheld: bool) -> None:
        """On its last acknowledgement SGLang frees what did not land of the operation's pages."""
        self._withheld[first:end] = bytes([withheld]) * (end - first)
        free = ~torch.tensor(list(self._withheld), dtype=torch.bool)
        self.operation.host_indices = self._host_indices.reshape(self.pages, -1)[free].flatten()

    def _give_back(self, first: int, end: int) -> None:
        with self._lock:
            if not self._acknowledged:
                self._set_withheld(first, end, False)
                return
        self.controller.append_host_mem_release(self.host_indices(first, end))
        with self._lock:
            self._withheld[first:end] = bytes(end - first)
        self._leave()

    def open_part(self, lane: Lane, first: int, end: int) -> LaneWork:
        """`lane` begins to bring the load's pages `[first, end)`, and keeps the books in the result."""
        with self._lock:
            self._open_parts += 1
            first_page, asked_end = self.first_page + first, self.first_page + end
            work = LaneWork(lane, first_page, asked_end, self._open_loads.arrived)
            self.lane_work.append(work)
            return work

    def land(self, first: int, end: int) -> None:
        """Pages `[first, end)` are whole in the host pool."""
        from sglang.srt.managers.cache_controller import PrefetchAck

        with self._lock:
            self._landed[first:end] = b"\x01" * (end - first)
            before = self.prefix
            gap = self._landed.find(0, before)
            self.prefix = self.pages if gap < 0 else gap
            if self.prefix == before:
                return
            self.controller.prefetch_sync_queue.put(
                PrefetchAck(
                    rid=self.operation.request_id,
                    completed_tokens=self.prefix * self.controller.page_size,
                    operation=self.operation,
                )
            )
            if self._on_prefix is not None:
                self._on_prefix(self, before)

    def close_part(self) -> None:
        """A lane has let go; the last one to do so ends the load."""
        with self._lock:
            self._open_parts -= 1
            if self._open_parts:
                return
        if self._on_lanes_done is not None:
            try:
                self._on_lanes_done(self)
            except Exception:
                # SGLang must get its memory back whatever becomes of the report.
                faults.record("the load of request %s was not reported", self.operation.request_id)
        if self._hold is None:
            self.acknowledge()
        else:
            self._hold(self)

    def acknowledge(self) -> None:
        """Give SGLang its pages; its scheduler thread goes on with them.  Once."""
        with self._lock:
            self._acknowledged = True
        acknowledge(self.controller, self.operation, self.prefix)
        with self._lock:
            self._given_back = True
        self._leave()

    def _leave(self) -> None:
        """SGLang has its last word and every page: nothing of the load is left."""
        with self._lock:
            over = self._given_back and not any(self._withheld)
        if over:
            self._open_loads.remove(self)


def acknowledge(controller: HybridCacheController, operation: PrefetchOperation, pages: int) -> None:
    """Give `operation` back to SGLang with `pages` whole pages: its last word, said once."""
    from sglang.srt.managers.cache_controller import PrefetchAck

    try:
        controller._page_transfer_sidecar(operation, pages)
    except Exception:
        faults.record("request %s: its side pools were not read", operation.request_id)
    controller.prefetch_sync_queue.put(
        PrefetchAck(rid=operation.request_id, operation=operation, completed_req=True)
    )
