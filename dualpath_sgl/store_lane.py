"""The store lane: storage -> this rank's host pool, one load after another.

It is the engine's storage link in DualPath's eyes: its queue in bytes and its measured drain
rate are what the scheduler sees.
"""

from __future__ import annotations

import logging
import threading
import time
from queue import SimpleQueue
from typing import NamedTuple

from dualpath_sgl.lane_priority import wait_politely
from dualpath_sgl.page_load import LaneClock, PageLoad

logger = logging.getLogger(__name__)

LEAST_BATCH_BYTES = 8 * 1024 * 1024
MOST_BATCH_BYTES = 64 * 1024 * 1024
BATCH_S = 0.05
"""One read takes about so long at the measured rate, within these sizes: long beside what a read costs
whatever its size (some milliseconds, in which the link idles), short enough to forward behind it."""
RATE_MEMORY = 0.8
"""What bytes and seconds of earlier batches still count in the drain rate after one more batch."""


class _Part(NamedTuple):
    load: PageLoad
    first: int
    end: int
    clock: LaneClock


class StoreLane(threading.Thread):
    def __init__(self) -> None:
        super().__init__(name="dualpath-store-lane", daemon=True)
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
        """Of the next read."""
        return min(max(LEAST_BATCH_BYTES, int(self.rate_bytes_per_s * BATCH_S)), MOST_BATCH_BYTES)

    def submit(self, load: PageLoad, first: int, end: int) -> None:
        """Read pages `[first, end)` of `load`; the part is open from now on."""
        with self._lock:
            self.queue_bytes += (end - first) * load.page_bytes
        self._parts.put(_Part(load, first, end, load.open_part("store", first)))

    def run(self) -> None:
        wait_politely()
        while True:
            part = self._parts.get()
            try:
                self._read(part)
            except Exception:
                logger.exception(
                    "Storage read failed for request %s; the rest of its prefix is recomputed",
                    part.load.operation.request_id,
                )
            finally:
                unread_pages = part.load.first_page + part.end - part.clock.end_page
                with self._lock:
                    self.queue_bytes -= unread_pages * part.load.page_bytes
                part.load.close_part()

    def _read(self, part: _Part) -> None:
        load, first = part.load, part.first
        while first < part.end and not load.cancelled:
            end = min(first + max(1, self.batch_bytes // load.page_bytes), part.end)
            part.clock.begin()
            started_s = time.monotonic()
            whole = read_pages(load, first, end)
            self._account(whole * load.page_bytes, time.monotonic() - started_s)
            part.clock.moved(whole, whole * load.page_bytes)
            load.land(first, first + whole)
            if whole < end - first:
                return
            first = end

    def _account(self, byte_count: int, elapsed_s: float) -> None:
        with self._lock:
            self.queue_bytes -= byte_count
            if byte_count:
                self._recent_bytes = RATE_MEMORY * self._recent_bytes + byte_count
                self._recent_s = RATE_MEMORY * self._recent_s + elapsed_s


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
