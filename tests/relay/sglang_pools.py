"""SGLang's own host pools of every kind, small and on the CPU, with the backend that loads into them."""

from __future__ import annotations

import ctypes
import os
from types import SimpleNamespace

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

import torch
from sglang.srt.mem_cache.device_pool_info import (
    KVBufferLayout,
    KVBuffers,
    MambaStateBufferInfo,
    MHABufferInfo,
    MLABufferInfo,
)
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, PoolName, PoolTransfer
from sglang.srt.mem_cache.memory_pool_host import (
    DeepSeekV4PagedHostPool,
    DeepSeekV4StateHostPool,
    LogicalHostPool,
)
from sglang.srt.mem_cache.pool_host.base import host_memory_budget_scope
from sglang.srt.mem_cache.pool_host.dsa import DSAIndexerHostPoolBuilder, DSAIndexerPoolHost
from sglang.srt.mem_cache.pool_host.host_pool_decl import HostPoolDecl, HostPoolStorageInfo
from sglang.srt.mem_cache.pool_host.mamba import MambaPoolHost
from sglang.srt.mem_cache.pool_host.mha import (
    AsymmetricMHATokenToKVPoolHost,
    MHATokenToKOnlyPoolHost,
    MHATokenToKVPoolHost,
)
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

from dualpath_sgl.relay.client.options import OPTIONS_KEY
from dualpath_sgl.relay.client.store import RelayStore

PAGE_TOKENS, POOL_PAGES, LAYERS, PAGES = 16, 40, 4, 12
"""`PAGES` of a pool are stored and come back into others of its pages."""
INDEXER_BYTES = 132
POOLS_BYTES = 2**30
"""Of host memory, at the most: else SGLang wants 10 GiB to stay free."""
CPU = torch.device("cpu")


@host_memory_budget_scope(POOLS_BYTES)
def mha(
    layout: str, layers: int = LAYERS, v_head_dim: int = 64, dtype: torch.dtype = torch.float32
) -> MHATokenToKVPoolHost:
    keys = tuple(torch.zeros(PAGE_TOKENS, 2, 64, dtype=dtype) for _ in range(layers))
    values = tuple(torch.zeros(PAGE_TOKENS, 2, v_head_dim, dtype=dtype) for _ in range(layers))
    info = MHABufferInfo(
        buffers=KVBuffers(
            k=keys,
            v=values,
            k_data_ptrs=_addresses(keys),
            v_data_ptrs=_addresses(values),
            layout=KVBufferLayout.NHD,
        ),
        page_size=PAGE_TOKENS,
        head_num=2,
        head_dim=64,
        v_head_dim=v_head_dim,
        dtype=dtype,
        device=CPU,
    )
    cls = MHATokenToKVPoolHost if v_head_dim == 64 else AsymmetricMHATokenToKVPoolHost
    return cls(info, **_shape(layout, layers))


@host_memory_budget_scope(POOLS_BYTES)
def keys_only(anchor: MHATokenToKVPoolHost) -> MHATokenToKOnlyPoolHost:
    """Of an indexer whose keys are kept as they are (MiniMax-M3)."""
    device = SimpleNamespace(
        store_dtype=torch.float32,
        start_layer=0,
        end_layer=LAYERS,
        head_num=1,
        head_dim=64,
        layer_num=LAYERS,
        device="cpu",
        k_buffer=[torch.zeros(PAGE_TOKENS, 1, 64) for _ in range(LAYERS)],
    )
    return MHATokenToKOnlyPoolHost(device, anchor, anchor.layout, pin_memory=False)


@host_memory_budget_scope(POOLS_BYTES)
def mla(layout: str, layers: int = LAYERS) -> MLATokenToKVPoolHost:
    buffers = tuple(torch.zeros(PAGE_TOKENS, 1, 576) for _ in range(layers))
    info = MLABufferInfo(
        buffers=buffers,
        data_ptrs=_addresses(buffers),
        layer_indices=tuple(range(layers)),
        device_layer_num=layers,
        page_size=PAGE_TOKENS,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        kv_cache_dim=576,
        dtype=torch.float32,
        device=CPU,
    )
    return MLATokenToKVPoolHost(info, target_layer_num=layers, **_shape(layout, layers))


def _addresses(buffers: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.tensor([buffer.data_ptr() for buffer in buffers], dtype=torch.uint64)


def _shape(layout: str, layers: int) -> dict[str, object]:
    return {
        "host_to_device_ratio": 2.0,
        "host_size": 0,
        "page_size": PAGE_TOKENS,
        "layout": layout,
        "pin_memory": False,
        "device_capacity_tokens": PAGE_TOKENS,
        "start_layer": 0,
        "end_layer": layers,
        "host_token_capacity": POOL_PAGES * PAGE_TOKENS,
    }


class _Indexer(DSAIndexerPoolHost):
    def _device_owned_layer_range(self) -> tuple[int, int]:
        return 0, LAYERS


@host_memory_budget_scope(POOLS_BYTES)
def indexer(anchor: MLATokenToKVPoolHost) -> DSAIndexerPoolHost:
    device = SimpleNamespace(
        store_dtype=torch.uint8,
        start_layer=0,
        end_layer=LAYERS,
        layer_num=LAYERS,
        device="cpu",
        index_k_with_scale_buffer=[
            torch.zeros(1, PAGE_TOKENS * INDEXER_BYTES, dtype=torch.uint8) for _ in range(LAYERS)
        ],
    )
    decl = HostPoolDecl(
        pool_name=PoolName.INDEXER,
        device_pool=device,
        indices_from_pool=PoolName.KV,
        layout_source=PoolName.KV,
        storage_info=HostPoolStorageInfo(bytes_per_token_per_layer=INDEXER_BYTES, dtype=torch.uint8),
        host_pool_builder=DSAIndexerHostPoolBuilder(),
    )
    return _Indexer(decl, anchor, pin_memory=False)


@host_memory_budget_scope(POOLS_BYTES)
def mamba(slots: int = 8, layers: int = 3) -> MambaPoolHost:
    info = MambaStateBufferInfo(
        temporal=torch.zeros(layers, slots, 4, 64, 64),
        conv=(torch.zeros(layers, slots, 96, 3), torch.zeros(layers, slots, 32, 3)),
    )
    return MambaPoolHost(info, 2.0, 0, device_capacity=slots, pin_memory=False, layout="page_first_direct")


@host_memory_budget_scope(POOLS_BYTES)
def dsv4(name: str, bytes_a_page: int, layers: int, layout: str) -> DeepSeekV4PagedHostPool:
    device = [torch.zeros(1, bytes_a_page, dtype=torch.uint8) for _ in range(layers)]
    return DeepSeekV4PagedHostPool(
        name, device, bytes_a_page, POOL_PAGES, PAGE_TOKENS, layout=layout, pin_memory=False
    )


@host_memory_budget_scope(POOLS_BYTES)
def dsv4_states(name: str, layers: int, layout: str) -> DeepSeekV4StateHostPool:
    """What layers that compress have of tokens that fill no page of theirs yet: a ring for each page of SWA."""
    ring_tokens = 8
    states = [
        SimpleNamespace(
            ring_size=ring_tokens, kv_score_buffer=SimpleNamespace(kv_score=torch.zeros(ring_tokens, 1024))
        )
        for _ in range(layers)
    ]
    return DeepSeekV4StateHostPool(name, states, POOL_PAGES, PAGE_TOKENS, layout=layout, pin_memory=False)


@host_memory_budget_scope(POOLS_BYTES)
def dsv4_anchor(layout: str) -> LogicalHostPool:
    return LogicalHostPool(POOL_PAGES * PAGE_TOKENS, PAGE_TOKENS, layout)


_never_destroyed: list[RelayStore] = []
"""The destructor of Mooncake's client holds the interpreter for a second, and with it the next test's pulls."""


class Backend:
    """A RelayStore over pools; every page of theirs has bytes of its own."""

    def __init__(
        self,
        name: str,
        relays: list[str],
        anchor: object,
        sides: dict[object, object],
        *,
        is_mla: bool = False,
        tp: tuple[int, int] = (0, 1),
        pp: tuple[int, int] = (0, 1),
        cls: type[RelayStore] = RelayStore,
    ) -> None:
        options = {"relays": relays, "least_call_bytes": 0, "bounce_bytes": 16 * 2**20}
        config = HiCacheStorageConfig(
            tp_rank=tp[0],
            tp_size=tp[1],
            pp_rank=pp[0],
            pp_size=pp[1],
            attn_cp_rank=0,
            attn_cp_size=1,
            is_mla_model=is_mla,
            enable_storage_metrics=False,
            is_page_first_layout=False,
            model_name=name,
            extra_config={OPTIONS_KEY: options},
        )
        self.store = cls(config)
        _never_destroyed.append(self.store)
        self.anchor, self.sides = anchor, sides
        self.store.register_mem_pool_host(anchor)
        for side, pool in sides.items():
            self.store.register_mem_host_pool_v2(pool, side)
        for pool in (anchor, *sides.values()):
            for buffer in self.store._iter_host_pool_buffers(pool):
                buffer.view(torch.uint8).random_(0, 256)
        self.hashes = [f"page-{number}" for number in range(PAGES)]

    @property
    def has_kv(self) -> bool:
        return not isinstance(self.anchor, LogicalHostPool)

    def put(self) -> dict[object, list[bytes]]:
        """Stores every pool's first pages; their bytes."""
        bytes_of: dict[object, list[bytes]] = {}
        if self.has_kv:
            assert all(self.store.batch_set_v1(self.hashes, _tokens(0)))
            bytes_of[PoolName.KV] = _bytes(self.anchor, _tokens(0))
        for side, pool in self.sides.items():
            transfer = self._transfer(side, 0)
            assert all(self.store.batch_set_v2([transfer])[side])
            bytes_of[side] = _bytes(pool, transfer.host_indices)
        return bytes_of

    def get(self) -> dict[object, list[bytes]]:
        """Loads them into every pool's later pages; what these hold then."""
        bytes_of: dict[object, list[bytes]] = {}
        if self.has_kv:
            assert all(self.store.batch_get_v1(self.hashes, _tokens(20)))
            bytes_of[PoolName.KV] = _bytes(self.anchor, _tokens(20))
        transfers = {side: self._transfer(side, 20) for side in self.sides}
        results = self.store.batch_get_v2(list(transfers.values())) if transfers else {}
        for side, transfer in transfers.items():
            assert all(results[side]), results
            bytes_of[side] = _bytes(self.sides[side], transfer.host_indices)
        return bytes_of

    def _transfer(self, side: object, first_page: int) -> PoolTransfer:
        if side == PoolName.MAMBA:  # one state a slot
            slot = 1 if first_page == 0 else 5
            return PoolTransfer(name=side, host_indices=torch.arange(slot, slot + 1), keys=self.hashes[-1:])
        keys = self.hashes[-3:] if side == PoolName.SWA else self.hashes  # a window at the end
        return PoolTransfer(name=side, host_indices=_tokens(first_page, len(keys)), keys=list(keys))


def _tokens(first_page: int, pages: int = PAGES) -> torch.Tensor:
    return torch.arange(first_page * PAGE_TOKENS, (first_page + pages) * PAGE_TOKENS)


def _bytes(pool: object, indices: torch.Tensor) -> list[bytes]:
    addresses, sizes = pool.get_page_buffer_meta(indices)
    return [ctypes.string_at(address, size) for address, size in zip(addresses, sizes, strict=True)]
