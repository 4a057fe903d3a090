"""Mooncake Store read no faster than a storage link would allow: for measuring where links cannot be shaped."""

from __future__ import annotations

import time
from typing import Any

from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
from sglang.srt.mem_cache.storage.mooncake_store.mooncake_store import MooncakeStore

from dualpath_sgl.limits.read_limit import ReadLimit, read_limit


class LimitedStore(MooncakeStore):
    """Upstream's storage backend, limited; clusters in upstream's modes name it when they set a rate."""

    def __init__(self, storage_config: HiCacheStorageConfig, _kwargs: dict[str, Any]) -> None:
        """Connect to the store.

        Raises ValueError for a rate that is not a number above 0, and whatever MooncakeStore raises.
        """
        limit = read_limit(storage_config.extra_config or {})
        super().__init__(storage_config)
        if limit is not None:
            slow_down(self, limit)


def slow_down(store: MooncakeStore, limit: ReadLimit) -> None:
    """Pace every read of `store` from now on."""
    read = store._get_batch_zero_copy_impl

    def paced_read(key_strs: list[str], buffer_ptrs: list[Any], buffer_sizes: list[Any]) -> list[int]:
        begun_s = time.monotonic()
        results = read(key_strs, buffer_ptrs, buffer_sizes)
        # Results are bytes, or negative error codes.
        limit.pace(sum(result for result in results if result > 0), begun_s)
        return results

    store._get_batch_zero_copy_impl = paced_read
