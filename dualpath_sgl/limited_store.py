"""Mooncake Store as SGLang's HiCache backend, read no faster than a storage link would allow.

For measuring where links cannot be shaped: every engine reads at `read_rate_bytes_per_s` at most.
Reads of one engine share its rate in the order in which they end, as on a link of its own.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
from sglang.srt.mem_cache.storage.mooncake_store.mooncake_store import MooncakeStore

READ_RATE_KEY = "read_rate_bytes_per_s"
"""In `--hicache-storage-backend-extra-config`."""


class ReadLimit:
    """Delays whoever has read `count` bytes until a link of `rate_bytes_per_s` had brought them."""

    def __init__(self, rate_bytes_per_s: float) -> None:
        self._rate_bytes_per_s = rate_bytes_per_s
        self._free_s = 0.0
        """Monotonic time at which the imagined link has brought everything so far."""
        self._lock = threading.Lock()

    def pace(self, count: int, begun_s: float) -> None:
        """`count` bytes were read by a call that began at `begun_s` (monotonic): wait for the link."""
        with self._lock:
            self._free_s = max(self._free_s, begun_s) + count / self._rate_bytes_per_s
            until_s = self._free_s
        time.sleep(max(0.0, until_s - time.monotonic()))


class LimitedStore(MooncakeStore):
    def __init__(self, storage_config: HiCacheStorageConfig, _kwargs: dict[str, Any]) -> None:
        """Connect to the store.

        Raises ValueError for a rate that is not a number above 0, and whatever MooncakeStore raises.
        """
        self._read_limit = read_limit(storage_config.extra_config or {})
        super().__init__(storage_config)

    def _get_batch_zero_copy_impl(
        self, key_strs: list[str], buffer_ptrs: list[Any], buffer_sizes: list[Any]
    ) -> list[int]:
        begun_s = time.monotonic()
        results = super()._get_batch_zero_copy_impl(key_strs, buffer_ptrs, buffer_sizes)
        if self._read_limit is not None:
            # Results are bytes, or negative error codes.
            self._read_limit.pace(sum(result for result in results if result > 0), begun_s)
        return results


def read_limit(extra_config: dict[str, Any]) -> ReadLimit | None:
    """The limit that a backend's extra configuration asks for.  Raises ValueError."""
    rate = extra_config.get(READ_RATE_KEY)
    if rate is None:
        return None
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not rate > 0:
        raise ValueError(
            f"{READ_RATE_KEY} is {rate!r} in --hicache-storage-backend-extra-config: give bytes per "
            "second above 0, or leave it out for no limit"
        )
    return ReadLimit(rate)
