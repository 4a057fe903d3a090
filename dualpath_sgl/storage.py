"""The HiCache storage backend of an engine under DualPath: Mooncake Store plus the two lanes.

Named in `--hicache-storage-backend-extra-config` (backend `dynamic`).  Keys, layout and every
read and write are SGLang's own `MooncakeStore`; what this class adds is the life of the engine's
DualPath runtime, which needs the host pool that is registered here.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, PoolName

from dualpath_sgl import engine_facts, runtime, weights
from dualpath_sgl.config import settings
from dualpath_sgl.hooks import assert_applied
from dualpath_sgl.limited_store import LimitedStore
from dualpath_sgl.start_checks import require


class DualPathStorage(LimitedStore):
    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: dict[str, Any]) -> None:
        """Connect to the store.

        Raises RuntimeError when DualPath is off or its hooks did not apply, start_checks.Refused
        when it cannot serve this rank, and whatever LimitedStore raises.
        """
        if not settings().enabled:
            raise RuntimeError(
                "storage backend 'dualpath' needs DUALPATH_ENABLED=1; without it use "
                "--hicache-storage-backend mooncake"
            )
        assert_applied()
        require(engine_facts.of_backend(storage_config))
        super().__init__(storage_config, kwargs)

    def _tag_keys(self, keys: list[str]) -> list[str]:
        """Every key that is read, written or asked for comes through here, on any of SGLang's threads."""
        name = weights.current().name
        return super()._tag_keys([f"{name}_{key}" for key in keys] if name else keys)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        if host_pool_name != PoolName.KV:
            require(engine_facts.of_side_pool(host_pool_name, self.storage_config.tp_size))
        super().register_mem_host_pool_v2(host_pool, host_pool_name)

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        require(engine_facts.of_pool(mem_pool_host))
        super().register_mem_pool_host(mem_pool_host)
        runtime.start(settings(), self.storage_config, mem_pool_host)
