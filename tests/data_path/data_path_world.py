"""The parts the data-path tests are told with: host pools, prefetch operations, a page store.

The host pool, its group, the prefetch operation and the batch reader are SGLang's own, on the
CPU; transfers go through real Mooncake engines over loopback.  Two things stand in:
`RamStore` for Mooncake Store (the end-to-end tests have the real one), and `Controller` for
HybridCacheController, of which a load uses four methods and a queue.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from queue import Empty, Queue

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
os.environ.setdefault("MC_LOG_LEVEL", "ERROR")

import torch
from sglang.srt.managers.cache_controller import HiCacheController, PrefetchAck
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle
from sglang.srt.mem_cache.device_pool_info import KVBufferLayout, KVBuffers, MHABufferInfo
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import (
    HybridCacheController,
    PrefetchOperation,
)
from sglang.srt.mem_cache.pool_host.group import HostPoolGroup, PoolEntry
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

from dualpath_sgl.lanes.forward import Forwarder
from dualpath_sgl.lanes.open_loads import OpenLoads
from dualpath_sgl.lanes.page_load import PageLoad
from dualpath_sgl.pools.layout import page_blocks, page_bytes

WAIT_S = 30.0
"""How long a test waits for something that must happen before it fails."""
PAGE_TOKENS = 4
LAYERS = 3
FINGERPRINT = "layout-1"

rooms = itertools.count(1)


def host_pool(
    pages: int, page_tokens: int | None = None, layer_count: int | None = None
) -> MHATokenToKVPoolHost:
    """SGLang's host pool with `pages` free pages of random bytes, layout page_first_direct."""
    page_tokens, layer_count = page_tokens or PAGE_TOKENS, layer_count or LAYERS
    device = torch.device("cpu")
    layers = tuple(torch.zeros(page_tokens, 2, 8) for _ in range(layer_count))
    pointers = torch.tensor([layer.data_ptr() for layer in layers], dtype=torch.uint64)
    pool = MHATokenToKVPoolHost(
        MHABufferInfo(
            buffers=KVBuffers(
                k=layers, v=layers, k_data_ptrs=pointers, v_data_ptrs=pointers, layout=KVBufferLayout.NHD
            ),
            page_size=page_tokens,
            head_num=2,
            head_dim=8,
            v_head_dim=8,
            dtype=torch.float32,
            device=device,
        ),
        host_to_device_ratio=2.0,
        host_size=0,
        page_size=page_tokens,
        layout="page_first_direct",
        pin_memory=False,
        device_capacity_tokens=page_tokens,
        start_layer=0,
        end_layer=layer_count,
        host_token_capacity=pages * page_tokens,
    )
    pool.kv_buffer.normal_()
    return pool


def page_numbers(indices: torch.Tensor, page_tokens: int = PAGE_TOKENS) -> list[int]:
    return [index // page_tokens for index in indices.tolist()[::page_tokens]]


def bytes_of(pool: MHATokenToKVPoolHost, indices: torch.Tensor) -> torch.Tensor:
    """Copy of the pages' K and V, float32 `[pages, 2, ...]`."""
    return pool.kv_buffer[:, page_numbers(indices, pool.page_size)].transpose(0, 1).clone()


class RamStore:
    """Pages by hash.  Stands in for Mooncake Store below SGLang's batch reader."""

    def __init__(self, pool: MHATokenToKVPoolHost) -> None:
        self._pool = pool
        self.pages: dict[str, torch.Tensor] = {}
        self.reads: list[str] = []
        self.before_read: Callable[[list[str]], None] = lambda hashes: None

    def batch_get_v1(self, hashes: list[str], host_indices: torch.Tensor, _extra) -> list[bool]:
        self.before_read(hashes)
        found = []
        for page, name in zip(page_numbers(host_indices, self._pool.page_size), hashes, strict=True):
            self.reads.append(name)
            found.append(name in self.pages)
            if found[-1]:
                self._pool.kv_buffer[:, page] = self.pages[name]
        return found


class Controller:
    """What a load asks of HybridCacheController; the methods are SGLang's."""

    _page_transfer_kv_batch = HiCacheController._page_transfer_kv_batch
    page_get_func = HiCacheController._page_get_zero_copy
    _page_transfer_sidecar = HybridCacheController._page_transfer_sidecar
    append_host_mem_release = HiCacheController.append_host_mem_release

    def __init__(self, pool: MHATokenToKVPoolHost) -> None:
        self.page_size = pool.page_size
        self.storage_host_pool = pool
        self.mem_pool_host = HostPoolGroup(
            [PoolEntry(PoolName.KV, pool, None, lambda layer: layer, is_primary_index_anchor=True)]
        )
        self.storage_backend = RamStore(pool)
        self.prefetch_sync_queue: Queue[PrefetchAck] = Queue()
        self.host_mem_release_queue: Queue[torch.Tensor] = Queue()


class Rank:
    """One engine rank: host pool, forwarding engine and controller."""

    def __init__(
        self,
        pages: int,
        forwarder: type[Forwarder] = Forwarder,
        page_tokens: int | None = None,
        layer_count: int | None = None,
    ) -> None:
        self.pool = host_pool(pages, page_tokens, layer_count)
        self.page_bytes = page_bytes(self.pool)
        self.forwarder = forwarder("127.0.0.1", "tcp", "", self.pool.get_hybrid_pool_buffer())
        self.controller = Controller(self.pool)
        self.open_loads = OpenLoads()

    def pages(self, count: int) -> torch.Tensor:
        """Reserve `count` pages: host token slots."""
        indices = self.pool.alloc(count * self.pool.page_size)
        assert indices is not None, "the test's pool is too small"
        return indices

    def blocks(self, indices: torch.Tensor) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
        return page_blocks(self.pool, indices)

    def load(self, pages: int, first_page: int = 0, **callbacks) -> PageLoad:
        """A load of `pages` freshly reserved pages, as SGLang hands it to its I/O thread."""
        name = f"request-{next(rooms)}"
        operation = PrefetchOperation(CacheRequestHandle(name, 0), list(range(pages * self.pool.page_size)))
        operation.host_indices = self.pages(pages)
        operation.hash_value = [f"{name}/{page}" for page in range(pages)]
        operation.storage_start = first_page * PAGE_TOKENS
        return PageLoad(
            self.controller,
            operation,
            open_loads=self.open_loads,
            page_bytes=self.page_bytes,
            **callbacks,
        )

    def store(self, load: PageLoad, pages: torch.Tensor) -> None:
        """Let the store hold `pages` (see bytes_of) as the first pages of `load`."""
        for name, page in zip(load.operation.hash_value, pages, strict=False):
            self.controller.storage_backend.pages[name] = page

    def fill(self, indices: torch.Tensor, pages: Sequence[torch.Tensor]) -> None:
        """Write `pages` (see bytes_of) into the pool."""
        for number, page in zip(page_numbers(indices, self.pool.page_size), pages, strict=True):
            self.pool.kv_buffer[:, number] = page

    def landed(self, load: PageLoad, first: int = 0, end: int | None = None) -> torch.Tensor:
        return bytes_of(self.pool, load.host_indices(first, load.pages if end is None else end))


def acknowledgements(controller: Controller) -> list[PrefetchAck]:
    """Everything acknowledged so far."""
    acks = []
    while True:
        try:
            acks.append(controller.prefetch_sync_queue.get_nowait())
        except Empty:
            return acks


def given_back(controller: Controller) -> list[int]:
    """Numbers of the host pages that SGLang was told to free so far, in that order."""
    pages = []
    while True:
        try:
            pages += page_numbers(controller.host_mem_release_queue.get_nowait(), controller.page_size)
        except Empty:
            return pages


def until_acknowledged(load: PageLoad) -> list[PrefetchAck]:
    """Every acknowledgement of a controller with one load, the final one last."""
    acks = [load.controller.prefetch_sync_queue.get(timeout=WAIT_S)]
    while not acks[-1].completed_req:
        acks.append(load.controller.prefetch_sync_queue.get(timeout=WAIT_S))
    return acks


def eventually(condition: Callable[[], object], what: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"{what}: did not happen in {WAIT_S:g} s"
        time.sleep(0.005)
