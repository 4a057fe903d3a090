"""SGLang's own radix cache, controller and storage threads on the CPU; nothing of theirs is changed."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
import types
import unittest
from array import array
from collections.abc import Callable
from functools import partial

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

import torch
from sglang.srt.environ import envs
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.pool_host.base import host_memory_budget_scope
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components.base import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.mem_cache.utils import get_storage_hash_str
from sglang.srt.runtime_context import get_disagg, get_parallel
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

from dualpath_sgl.cpu_profile.plugin import activate

COMPONENTS = {
    "full": (ComponentType.FULL,),
    "mamba": (ComponentType.FULL, ComponentType.MAMBA),
    "swa": (ComponentType.FULL, ComponentType.SWA),
}
WAIT_S = 30.0
POOLS_BYTES = 2**30
"""Of host memory, at the most."""


class Tree:
    def __init__(
        self,
        kind: str,
        page_tokens: int,
        backend: str,
        extra: dict[str, object],
        rank: int = 0,
        ranks: int = 1,
        policy: str = "wait_complete",
        role: str = "prefill",
        core: str | None = None,
        device_tokens: int = 4096,
    ) -> None:
        """`backend`: of `--hicache-storage-backend`, `extra`: its extra configuration; `policy`: when prefetches
        are cut short.

        With several ranks torch's process group must be there.  `core`: SGLang's, of a tree that has computed
        pages on the device.
        """
        activate()  # copies that sgl-kernel makes on a GPU
        # SGLang's kit of cache fixtures wants its own base of test cases, which wants a GPU.
        stand_in = types.SimpleNamespace(CustomTestCase=unittest.TestCase)
        sys.modules.setdefault("sglang.test.test_utils", stand_in)
        from sglang.test.kits.unified_radix_cache import fixtures
        from sglang.test.kits.unified_radix_cache.config import CacheConfig

        shape: dict[str, object] = {}
        if kind == "full":
            shape["num_layers"] = 4
        elif kind == "swa":
            shape["sliding_window_size"] = 4 * page_tokens
        else:
            shape["enable_mamba_extra_buffer"] = True
        config = CacheConfig(
            page_size=page_tokens,
            components=COMPONENTS[kind],
            kv_size=device_tokens,
            dtype=torch.float32,
            head_dim=16,
            **shape,
        )
        if ranks > 1:
            group = torch.distributed.group.WORLD
            fixtures.CacheInitParams = partial(fixtures.CacheInitParams, tp_cache_group=group)
        self.tree, self.allocator, _ = fixtures.build_fixture(config, tree_core_backend="python")
        params = self.tree.cache_init_params
        if core is not None:
            # The kit's allocator gives slots from 1 on; a controller that copies to the host copies whole pages.
            self.allocator = params.token_to_kv_pool_allocator = PagedTokenToKVPoolAllocator(
                device_tokens,
                page_tokens,
                dtype=torch.float32,
                device="cpu",
                kvcache=self.allocator.get_kvcache(),
                need_sort=False,
            )
            with envs.SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND.override(core):
                self.tree = UnifiedRadixCache(params)
        args = ServerArgs(
            model_path="dummy",
            page_size=page_tokens,
            hicache_io_backend="direct",
            hicache_mem_layout="page_first_direct",
            hicache_write_policy="write_through",
            hicache_storage_backend=backend,
            hicache_storage_backend_extra_config=json.dumps({"prefetch_threshold": page_tokens, **extra}),
            hicache_storage_prefetch_policy=policy,
            context_length=512,
            hicache_ratio=2.0,
        )
        args._mamba_cache_chunk_size = 64
        set_global_server_args_for_scheduler(args)
        # Kept, or the overrides would end with them.
        self._overrides = [
            get_parallel().override(
                tp_rank=rank,
                tp_size=ranks,
                pp_rank=0,
                pp_size=1,
                attn_tp_rank=rank,
                attn_tp_size=ranks,
                moe_tp_rank=rank,
                moe_tp_size=ranks,
            ),
            get_disagg().override(disaggregation_mode=role),
        ]
        for override in self._overrides:
            override.__enter__()
        with host_memory_budget_scope(POOLS_BYTES):  # else SGLang wants 10 GiB to stay free
            self.tree.init_hicache(args, params)
        self.controller = self.tree.cache_controller
        self.backend = self.controller.storage_backend
        self._note_reads()
        self._page_tokens = page_tokens
        self._stored: dict[str, bytes] = {}
        self.read: list[list[tuple[str, int, int]]] = []
        """Key, address and size of what came by every read that SGLang made."""

    def _note_reads(self) -> None:
        impl = self.backend._get_batch_zero_copy_impl

        def noted(keys: list[str], addresses: list[int], sizes: list[int]) -> list[int]:
            got = impl(keys, addresses, sizes)
            came = [
                place
                for place, count in zip(zip(keys, addresses, sizes, strict=True), got, strict=True)
                if count > 0
            ]
            self.read.append(came)
            return got

        self.backend._get_batch_zero_copy_impl = noted

    def store_holds(self, tokens: list[int]) -> None:
        """Pages of random bytes, as the backend itself writes them."""
        hashes = self.hashes(tokens)
        pools = {PoolName.KV: self.controller.storage_host_pool, **self.backend.registered_pools}
        for pool in pools.values():
            self._each_buffer(pool, lambda buffer: buffer.random_(0, 256))
        indices = torch.arange(0, len(hashes) * self._page_tokens)
        assert all(self.backend.batch_set_v1(hashes, indices))
        keys, addresses, sizes = self.backend._batch_preprocess(self.backend._tag_keys(hashes), indices)
        self._note(keys, addresses, sizes)
        for name, pool in self.backend.registered_pools.items():
            if name == PoolName.KV:
                continue
            if name == PoolName.MAMBA:
                transfer = PoolTransfer(name=name, host_indices=torch.arange(1, 2), keys=hashes[-1:])
            else:
                tokens_there = torch.arange(0, len(hashes) * pool.page_size)
                transfer = PoolTransfer(name=name, host_indices=tokens_there, keys=hashes)
            assert all(self.backend.batch_set_v2([transfer])[name])
            keys, _ = self.backend._get_hybrid_page_component_keys(transfer.keys, transfer)
            self._note(self.backend._tag_keys(keys), *pool.get_page_buffer_meta(transfer.host_indices))
        for pool in pools.values():
            self._each_buffer(pool, lambda buffer: buffer.zero_())

    def hashes(self, tokens: list[int]) -> list[str]:
        """Of each page."""
        return get_storage_hash_str(RadixKey(array("q", tokens)), None, page_size=self._page_tokens)

    def relays_come_first(self) -> None:
        """The own client reads nothing before relays have brought something."""
        loader = self.backend.loader
        read = loader._own_read

        def read_later(*arguments: object) -> list[int]:
            until_s = time.monotonic() + WAIT_S
            while not loader.counts.relay_bytes and time.monotonic() < until_s:
                time.sleep(0.001)
            return read(*arguments)

        loader._own_read = read_later

    def prefetch(self, tokens: list[int]) -> int:
        """SGLang loads the prompt into its host pools; tokens that it says it has loaded."""
        handle = self.begin(tokens)
        self.ends(handle)
        return self.tree.prefetch_loaded_tokens_by_reqid.get(handle)

    def begin(self, tokens: list[int], name: str = "request") -> CacheRequestHandle:
        """SGLang's prefetch of the prompt, as a request of that name."""
        handle = CacheRequestHandle(name, 0)
        root = self.tree.root_node_handle()
        more = {"matched_prefix_tokens": [], "extra_key": None, "cache_salt": None}
        self.tree.prefetch_from_storage(handle, root, array("q", [*tokens, 1]), None, None, **more)
        assert self.tree.has_ongoing_prefetch(handle)
        return handle

    def ends(self, *handles: CacheRequestHandle) -> None:
        """SGLang's scheduler loop, until all of them are over."""
        self.goes_on(lambda: not any(self.tree.has_ongoing_prefetch(handle) for handle in handles), *handles)

    def goes_on(self, until: Callable[[], object], *handles: CacheRequestHandle) -> None:
        """SGLang's scheduler loop; `handles`: requests that it would schedule if their prefetch were over."""
        until_s = time.monotonic() + WAIT_S
        while not until():
            self.tree.check_hicache_events()
            for handle in handles:
                self.tree.check_prefetch_progress(handle)
            assert time.monotonic() < until_s
            time.sleep(0.002)

    def wrong(self) -> list[str]:
        """Keys that were read and whose bytes are not those that were stored; where memory was read into more
        than once, of the last time.
        """
        there = {address: (key, size) for came in self.read for key, address, size in came}
        return [
            key
            for address, (key, size) in there.items()
            if ctypes.string_at(address, size) != self._stored[key]
        ]

    def _note(self, keys: list[str], addresses: list[int], sizes: list[int]) -> None:
        for key, address, size in zip(keys, addresses, sizes, strict=True):
            self._stored[key] = ctypes.string_at(address, size)

    def _each_buffer(self, pool: object, do) -> None:
        for buffer in self.backend._iter_host_pool_buffers(pool):
            if buffer.numel():
                do(buffer.view(torch.uint8))
