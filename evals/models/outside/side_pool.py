"""The upper half of a model's layers in a pool of its own, whose pages follow those of the lower half.

SGLang's official door for such a pool is `register_stack_strategy`.  Real pools of this kind hold an indexer's keys or a
draft model's KV, with which an answer can be right although they are wrong.  Here it cannot: both halves
are the model's own KV.
"""

from __future__ import annotations

from typing import Any

import msgspec
from sglang.srt.mem_cache.hicache_storage import PoolName, SidecarPoolSpec
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
from sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler import (
    StackBuildResult,
    StackStrategy,
    build_pool_entry,
    register_stack_strategy,
)
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.pool_host import HostPoolGroup
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.runtime_context import get_memory

SIDE = PoolName.DRAFT
"""Stored under names of its own; for SGLang's Mooncake backend it is K and V of any kind of layers."""


class HalvesStrategy(StackStrategy):
    def matches(self, kvcache: Any, components: set[ComponentType]) -> bool:
        return isinstance(kvcache, MHATokenToKVPool) and components == {ComponentType.FULL}

    def build(
        self,
        *,
        cache: Any,
        kvcache: MHATokenToKVPool,
        params: Any,
        server_args: Any,
        load_cache_event: Any,
        storage_backend: str | None = None,
        storage_backend_extra_config: dict[str, Any] | None = None,
        prefetch_threshold: int = 256,
        model_name: str | None = None,
        enable_storage_metrics: bool = False,
    ) -> StackBuildResult:
        memory, layers = get_memory(), kvcache.layer_num
        lower, upper = range(layers // 2), range(layers // 2, layers)
        anchor = _host_pool(kvcache, lower, params.page_size, "kv", None)
        side = _host_pool(kvcache, upper, params.page_size, "side", anchor.size)
        group = HostPoolGroup(
            [
                build_pool_entry(
                    name=name,
                    host_pool=pool,
                    device_pool=kvcache,
                    layer_mapping={layer: index for index, layer in enumerate(half)},
                    transfer_layer_id_max=layers,
                    is_anchor=name == PoolName.KV,
                )
                for name, pool, half in ((PoolName.KV, anchor, lower), (SIDE, side, upper))
            ]
        )
        controller = HybridCacheController(
            params.token_to_kv_pool_allocator,
            group,
            params.page_size,
            params.tp_cache_group,
            load_cache_event=load_cache_event,
            attn_cp_group=params.attn_cp_cache_group,
            attn_tp_group=params.attn_tp_cache_group,
            pp_group=params.pp_cache_group,
            write_policy=memory.hicache_write_policy,
            io_backend=memory.hicache_io_backend,
            storage_backend=storage_backend,
            prefetch_threshold=prefetch_threshold,
            model_name=model_name,
            storage_backend_extra_config=storage_backend_extra_config,
            transfer_layer_id_max=layers,
            enable_storage_metrics=enable_storage_metrics,
            host_memory_mode=memory.hicache_host_memory_mode,
        )
        return StackBuildResult(
            host_pool_group=group,
            cache_controller=controller,
            component_host_pools={ComponentType.FULL: anchor},
            sidecars=[SidecarPoolSpec(pool_name=SIDE, indices_from_pool=PoolName.KV)],
            pools_desc="KV + half of the layers beside it",
        )


def _host_pool(
    kvcache: MHATokenToKVPool, layers: range, page_tokens: int, label: str, tokens: int | None
) -> MHATokenToKVPoolHost:
    """For these layers only; `tokens`: as large as the anchor."""
    info = kvcache.get_device_pool_infos()[0].buffer_info
    part = slice(layers.start, layers.stop)
    buffers = msgspec.structs.replace(
        info.buffers,
        k=info.buffers.k[part],
        v=info.buffers.v[part],
        k_data_ptrs=info.buffers.k_data_ptrs[part],
        v_data_ptrs=info.buffers.v_data_ptrs[part],
    )
    return MHATokenToKVPoolHost(
        msgspec.structs.replace(info, buffers=buffers),
        get_memory().hicache_ratio,
        get_memory().hicache_size,
        page_tokens,
        get_memory().hicache_mem_layout,
        device_capacity_tokens=kvcache.size,
        start_layer=0,
        end_layer=len(layers),
        pool_label=label,
        host_token_capacity=tokens,
    )


register_stack_strategy(HalvesStrategy())
