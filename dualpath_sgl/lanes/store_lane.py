"""The store lane: storage -> this rank's host pool, one load after another.

It is the engine's storage link in DualPath's eyes: its queue in bytes and its measured drain
rate are what the scheduler sees.

A store that hangs costs a load `HANG_S`, not the minutes that Mooncake may take: the lane goes on with
the next load, and the pages of the read stay with the thread that is in it (`PageLoad.withhold`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import NamedTuple

from dualpath_sgl.lanes.page_load import LaneWork, PageLoad
from dualpath_sgl.threads import faults
from dualpath_sgl.threads.priority import wait_politely

logger = logging.getLogger(__name__)

LEAST_BATCH_BYTES = 8 * 1024 * 1024
MOST_BATCH_BYTES = 64 * 1024 * 1024
BATCH_S = 0.05
"""One read takes about so long at the measured rate, within these sizes: long beside what a read costs
whatever its size (some milliseconds, in which the link idles), short enough to forward behind it."""
MOST_BATCH_S = 1.0
"""Nor does one take longer than this at the measured rate, however slow the store is."""
HANG_S = 10.0
"""A read that takes longer is given up."""
MOST_HANGING = 4
"""Reads given up and not over; with so many the store is not asked at all."""
RATE_MEMORY = 0.8
"""What bytes and seconds of earlier batches still count in the drain rate after one more batch."""


class _Part(NamedTuple):
    load: PageLoad
    first: int
    end: int
    work: LaneWork


class StoreHangs(Exception):
    """The rest of the load is recomputed."""


class StoreLane(threading.Thread):
    def __init__(self) -> None:
        super().__init__(name="dualpath-store-lane", daemon=True)
        self._reader: _Reader | None = None
        self._hanging = 0
        self._parts: SimpleQueue[_Part] = SimpleQueue()
        self._lock = threading.Lock()
        self.queue_bytes = 0
        """Submitted and not yet read."""
        self._recent_bytes = 0.0
        self._recent_s = 0.0

    @property
    def rate_bytes_per_s(self) -> float:
        """Over the last batches, long ones counting for their length; 0 until the first one."""
        with self._lock:
            return self._recent_bytes / self._recent_s if self._recent_s else 0.0

    @property
    def batch_bytes(self) -> int:
        """How much the next read asks for."""
        rate = self.rate_bytes_per_s
        least = min(LEAST_BATCH_BYTES, int(rate * MOST_BATCH_S) or LEAST_BATCH_BYTES)
        return min(max(least, int(rate * BATCH_S)), MOST_BATCH_BYTES)

    def submit(self, load: PageLoad, first: int, end: int) -> None:
        """Read pages `[first, end)` of `load`; the part is open from now on."""
        with self._lock:
            self.queue_bytes += (end - first) * load.page_bytes
        self._parts.put(_Part(load, first, end, load.open_part("store", first, end)))

    def take_over(self, load: PageLoad, first: int, end: int, reason: str) -> None:
        """Pages `[first, end)` of `load` did not come from its DE, for this reason: read them here."""
        logger.warning(
            "DualPath: pages [%d, %d) of request %s come from the store instead: %s",
            load.first_page + first,
            load.first_page + end,
            load.operation.request_id,
            reason,
        )
        load.fallback_reason = reason
        self.submit(load, first, end)

    def run(self) -> None:
        wait_politely()
        while True:
            part = self._parts.get()
            try:
                self._serve(part)
            except StoreHangs as hang:
                logger.warning("DualPath: request %s: %s", part.load.operation.request_id, hang)
            except Exception:
                faults.record(
                    "storage read failed for request %s; the rest of its prefix is recomputed",
                    part.load.operation.request_id,
                )

    def _serve(self, part: _Part) -> None:
        try:
            self._read(part)
        finally:
            unread_pages = part.load.first_page + part.end - part.work.end_page
            with self._lock:
                self.queue_bytes -= unread_pages * part.load.page_bytes
            part.load.close_part()

    def _read(self, part: _Part) -> None:
        load, first = part.load, part.first
        while first < part.end and not load.cancelled:
            end = min(first + max(1, self.batch_bytes // load.page_bytes), part.end)
            part.work.begin()
            started_s = time.monotonic()
            try:
                whole = self._read_pages(load, first, end)
            except Exception:
                part.work.moved(0, 0)
                raise
            self._account(whole * load.page_bytes, time.monotonic() - started_s)
            part.work.moved(whole, whole * load.page_bytes)
            load.land(first, first + whole)
            if whole < end - first:
                return
            first = end

    def _read_pages(self, load: PageLoad, first: int, end: int) -> int:
        """Pages `[first, end)`; how many are whole from `first` on.

        Raises StoreHangs, and whatever the store raises.
        """
        if self._hanging >= MOST_HANGING:
            raise StoreHangs(f"{self._hanging} storage reads hang: its pages are recomputed")
        reader = self._reader
        if reader is None:
            reader = _Reader()
            reader.start()
            self._reader = reader
        read = _Read(load, first, end)
        reader.reads.put(read)
        if not read.over.wait(HANG_S):
            self._give_up(read, reader)
        if read.error is not None:
            raise read.error
        return read.whole

    def _give_up(self, read: _Read, reader: _Reader) -> None:
        """Raises StoreHangs, unless the read has just ended."""
        give_back = read.load.withhold(read.first, read.end)
        with self._lock:
            self._hanging += 1

        def over() -> None:
            give_back()
            with self._lock:
                self._hanging -= 1

        if not read.leave_to_itself(over):
            over()
            return
        reader.reads.put(None)
        self._reader = None
        raise StoreHangs(
            f"the store has not answered for {HANG_S:g} s: from page {read.load.first_page + read.first} on "
            f"it is recomputed, {read.end - read.first} host pages are kept back until the read is over"
        )

    def _account(self, byte_count: int, elapsed_s: float) -> None:
        with self._lock:
            self.queue_bytes -= byte_count
            if byte_count:
                self._recent_bytes = RATE_MEMORY * self._recent_bytes + byte_count
                self._recent_s = RATE_MEMORY * self._recent_s + elapsed_s


class _Read:
    """One call of SGLang's batch reader."""

    def __init__(self, load: PageLoad, first: int, end: int) -> None:
        self.load, self.first, self.end = load, first, end
        self.whole = 0
        self.error: Exception | None = None
        self.over = threading.Event()
        self._at_last: Callable[[], None] | None = None
        self._lock = threading.Lock()

    def make(self) -> None:
        try:
            self.whole = read_pages(self.load, self.first, self.end)
        except Exception as error:
            self.error = error
        with self._lock:
            self.over.set()
        if self._at_last is not None:
            self._at_last()

    def leave_to_itself(self, at_last: Callable[[], None]) -> bool:
        """Call `at_last` when it is over, on another thread; False when it is over."""
        with self._lock:
            if not self.over.is_set():
                self._at_last = at_last
            return not self.over.is_set()


class _Reader(threading.Thread):
    """Makes one read after another, until it is told None."""

    def __init__(self) -> None:
        super().__init__(name="dualpath-store-reader", daemon=True)
        self.reads: SimpleQueue[_Read | None] = SimpleQueue()

    def run(self) -> None:
        wait_politely()
        while (read := self.reads.get()) is not None:
            read.make()


def read_pages(load: PageLoad, first: int, end: int) -> int:
    """Read pages `[first, end)` of `load` with SGLang's own batch reader; whole pages from `first`."""
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageExtraInfo, PoolName

    operation, controller = load.operation, load.controller
    prefix_keys = operation.prefix_keys
    if prefix_keys is not None:
        prefix_keys = prefix_keys + operation.hash_value[:first]
    with controller.mem_pool_host.layout_lease():
        return controller._page_transfer_kv_batch(
            operation,
            operation.hash_value[first:end],
            load.host_indices(first, end),
            HiCacheStorageExtraInfo(prefix_keys=prefix_keys),
            [t for t in operation.pool_transfers or [] if t.indices_from_pool == PoolName.KV],
        )
