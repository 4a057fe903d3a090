"""Mooncake Store as SGLang's HiCache backend, read no faster than a storage link would allow.

For measuring where links cannot be shaped (dualpath_sgl/read_limit.py).
"""

from __future__ import annotations

import time
from typing import Any

from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
from sglang.srt.mem_cache.storage.mooncake_store.mooncake_store import MooncakeStore

from dualpath_sgl.read_limit import read_limit


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
