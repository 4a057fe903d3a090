"""The HiCache storage backend of an engine under DualPath: Mooncake Store plus the two lanes.

Named in `--hicache-storage-backend-extra-config` (backend `dynamic`).  Keys, layout and every
read and write are SGLang's own `MooncakeStore`; what this class adds is the life of the engine's
DualPath runtime, which needs the host pool that is registered here.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, PoolName
from sglang.srt.mem_cache.storage.mooncake_store.mooncake_store import MooncakeStore

from dualpath_sgl import runtime
from dualpath_sgl.hooks import assert_applied
from dualpath_sgl.limits.limited_store import slow_down
from dualpath_sgl.limits.read_limit import read_limit
from dualpath_sgl.pools import weights
from dualpath_sgl.start import facts
from dualpath_sgl.start.checks import require
from dualpath_sgl.start.config import settings


class DualPathStorage(MooncakeStore):
    def __init__(self, storage_config: HiCacheStorageConfig, _kwargs: dict[str, Any]) -> None:
        """Connect to the store.

        Raises RuntimeError when DualPath is off or its hooks did not apply, start.checks.Refused
        when it cannot serve this rank, ValueError for a read rate that is
        none, and whatever MooncakeStore raises.
        """
        if not settings().enabled:
            raise RuntimeError(
                "storage backend 'dualpath' needs DUALPATH_ENABLED=1; without it use "
                "--hicache-storage-backend mooncake"
            )
        assert_applied()
        require(facts.of_backend(storage_config))
        limit = read_limit(storage_config.extra_config or {})
        super().__init__(storage_config)
        if limit is not None:
            slow_down(self, limit)

    def _tag_keys(self, keys: list[str]) -> list[str]:
        """Every key that is read, written or asked for comes through here, on any of SGLang's threads."""
        name = weights.current().name
        return super()._tag_keys([f"{name}_{key}" for key in keys] if name else keys)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        if host_pool_name != PoolName.KV:
            require(facts.of_side_pool(host_pool_name, self.storage_config.tp_size))
        super().register_mem_host_pool_v2(host_pool, host_pool_name)

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        require(facts.of_pool(mem_pool_host))
        super().register_mem_pool_host(mem_pool_host)
        runtime.start(settings(), self.storage_config, mem_pool_host)
