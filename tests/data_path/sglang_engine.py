"""SGLang's part of an engine rank without its model: real tree, controller, pools and requests, on the CPU.

`Scheduler` is SGLang's class without its start: of its methods the ones run that arrive, flush, attach and
detach.  What it does in between (admit, compute, finish) is done here by the same calls into the tree that it
makes.  One of these per process.
"""

from __future__ import annotations

import json
import os
from array import array
from types import SimpleNamespace

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
os.environ.setdefault("MC_LOG_LEVEL", "ERROR")

import torch
from sglang.srt.disaggregation.decode import DecodeRequest
from sglang.srt.disaggregation.decode_hicache_mixin import (
    DecodeHiCachePreallocMixin,
    DecodeHiCacheTransferMixin,
    HiCacheRestoreResult,
)
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.environ import envs
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestOutcome, EvictParams, InsertParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import match_kv_cache
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components.base import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.runtime_context import get_disagg, get_parallel
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

from dualpath_sgl import hooks
from dualpath_sgl.threads import faults

HEADS, HEAD_DIM, LAYERS = 2, 8, 2


class SglangEngine:
    """`tree`, `controller`, `allocator` (device pages), `scheduler`; `backend` reads and writes the store."""

    def __init__(
        self,
        role: str,
        *,
        backend: dict[str, object],
        core: str,
        page_tokens: int,
        host_pages: int,
        device_pages: int,
        policy: str,
        host_memory: str,
        eagle: bool,
        parallel: dict[str, int],
    ) -> None:
        """`backend` goes into SGLang's extra configuration; `parallel` into its ranks and sizes."""
        self.role, self.page_tokens = role, page_tokens
        device_tokens = device_pages * page_tokens
        args = ServerArgs(
            model_path="dummy",
            page_size=page_tokens,
            context_length=4096,
            hicache_io_backend="direct",
            hicache_mem_layout="page_first_direct",
            hicache_write_policy="write_through",
            hicache_storage_backend="dynamic" if "class_name" in backend else "mooncake",
            hicache_storage_backend_extra_config=json.dumps(backend),
            hicache_storage_prefetch_policy=policy,
            hicache_host_memory_mode=host_memory,
            hicache_ratio=host_pages / device_pages,
        )
        args._mamba_cache_chunk_size = 64
        set_global_server_args_for_scheduler(args)
        ranks = dict(tp_rank=0, tp_size=1, pp_rank=0, pp_size=1) | parallel
        # Kept, or the overrides would end with them.
        self._overrides = [get_parallel().override(**ranks), get_disagg().override(disaggregation_mode=role)]
        for override in self._overrides:
            override.__enter__()
        self.kv = MHATokenToKVPool(
            size=device_tokens,
            page_size=page_tokens,
            dtype=torch.float32,
            head_num=HEADS,
            head_dim=HEAD_DIM,
            layer_num=LAYERS,
            device="cpu",
            enable_memory_saver=False,
        )
        shape = dict(dtype=torch.float32, device="cpu", kvcache=self.kv, need_sort=False)
        if page_tokens == 1:
            self.allocator = TokenToKVPoolAllocator(device_tokens, **shape)
        else:
            self.allocator = PagedTokenToKVPoolAllocator(device_tokens, page_tokens, **shape)
        params = CacheInitParams(
            disable=False,
            req_to_token_pool=ReqToTokenPool(
                size=64, max_context_len=4096, device="cpu", enable_memory_saver=False
            ),
            token_to_kv_pool_allocator=self.allocator,
            page_size=page_tokens,
            tree_components=(ComponentType.FULL,),
            is_eagle=eagle,
        )
        with envs.SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND.override(core):
            self.tree = UnifiedRadixCache(params)
        self.tree.init_hicache(args, params)
        self.controller = self.tree.cache_controller
        self.host_pool = self.controller.storage_host_pool
        self.scheduler = _scheduler(role, self)
        self.queue: PreallocQueue = self.scheduler.disagg_decode_prealloc_queue
        self._requests = 0

    @property
    def backend(self):
        return self.controller.storage_backend

    # -- requests -------------------------------------------------------------------------------

    def request(self, tokens: array, room: int | None = None) -> Req:
        self._requests += 1
        req = Req(
            f"request-{self._requests}",
            "",
            array("q", tokens),
            SamplingParams(max_new_tokens=1),
            bootstrap_host="127.0.0.1",
            bootstrap_room=1000 + self._requests if room is None else room,
            disagg_mode=DisaggregationMode(self.role),
        )
        req.storage_prefetch_last_match_len = None
        return req

    def step(self) -> None:
        """One iteration of SGLang's loop, as far as its cache is concerned."""
        self.tree.check_hicache_events()
        if self.role == "decode":
            self.queue.pop_preallocated()
            self.scheduler.disagg_decode_transfer_queue.advance()
        else:
            self.scheduler._process_storage_prefetch_retries()

    def abort(self, req: Req) -> None:
        """The client has left: SGLang drops the request wherever it waits."""
        if self.role == "decode":
            self.queue.queue = [entry for entry in self.queue.queue if entry.req is not req]
            self.scheduler.disagg_decode_transfer_queue.drop(req)
            return
        waiting = self.scheduler.waiting_queue
        self.scheduler.waiting_queue = [other for other in waiting if other is not req]
        self.tree.finish(req.cache_request_handle, CacheRequestOutcome.ABORT)

    def finish(self, req: Req) -> None:
        """An admitted request has had its tokens."""
        if req in self.scheduler.waiting_queue:
            self.scheduler.waiting_queue.remove(req)
        self.tree.finish(req.cache_request_handle, CacheRequestOutcome.SUCCESS)

    def key(self, tokens: array) -> RadixKey:
        """The tree's name for the whole pages of `tokens`."""
        return RadixKey(array("q", tokens), is_bigram=self.tree.tree_core.is_eagle).page_aligned(
            self.page_tokens
        )

    def compute(self, tokens: array, pages: list[torch.Tensor]) -> bool:
        """A request with this prompt ends: `pages`, its KV, enters the tree.  False without memory for it."""
        key = self.key(tokens)[: len(pages) * self.page_tokens]
        missing = len(key) - self.allocator.available_size()
        if missing > 0:
            self.tree.evict(EvictParams(num_tokens=missing))
        slots = self.allocator.alloc(len(key))
        if slots is None:
            return False
        for number, page in enumerate(pages):
            rows = slots[number * self.page_tokens : (number + 1) * self.page_tokens]
            for layer in range(LAYERS):
                self.kv.k_buffer[layer][rows], self.kv.v_buffer[layer][rows] = page[0, layer], page[1, layer]
        self.tree.insert(InsertParams(key=key, value=slots))  # gives back what the tree holds already
        return True


class PreallocQueue(DecodeHiCachePreallocMixin):
    """SGLang's DecodePreallocQueue without connections: a request waits for the gate, then it is promised."""

    admission_gate = None

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler, self.tree_cache = scheduler, scheduler.tree_cache
        self.queue: list[DecodeRequest] = []
        self.retracted_queue: list[Req] = []
        self.held_rebootstrap_reqs: list[Req] = []
        self.transfer_queue = scheduler.disagg_decode_transfer_queue
        self.gloo_group = None

    def add(self, req: Req) -> None:
        self.queue.append(DecodeRequest(req, kv_receiver=None, waiting_for_input=True))
        faults.guarded(hooks.after_prealloc_add)(None, self, req)

    def pop_preallocated(self) -> None:
        faults.guarded(hooks.before_pop_preallocated)(self)
        for entry in list(self.queue):
            if self.admission_gate is None or self.admission_gate(entry):
                self.queue.remove(entry)
                self._admit(entry)

    def _admit(self, entry: DecodeRequest) -> None:
        req = entry.req
        found = match_kv_cache(req, self.tree_cache, req.origin_input_ids, cow_mamba=False)
        req.lock = self.tree_cache.lock(found.last_device_node)
        entry.prefix_match = self._build_decode_prefix_match(req, found)
        self._start_hicache_prefetch(req, entry.prefix_match)
        self.transfer_queue.queue.append(entry)


class TransferQueue(DecodeHiCacheTransferMixin):
    """SGLang's DecodeTransferQueue for which every prompt's rest has arrived at once."""

    def __init__(self, tree: UnifiedRadixCache) -> None:
        self.tree_cache = tree
        self.queue: list[DecodeRequest] = []
        self.ended: dict[str, DecodeRequest] = {}
        """By request id: restored, or failed to be."""
        self.holding = False
        """Promised requests wait, as they do for the prefill engine."""

    def advance(self) -> None:
        if self.holding:
            return
        self._process_hicache_local_restores(self.queue)
        for entry in [e for e in self.queue if e.hicache_restore_status is not HiCacheRestoreResult.PENDING]:
            self._end(entry)

    def drop(self, req: Req) -> None:
        for entry in [entry for entry in self.queue if entry.req is req]:
            self._end(entry)

    def _end(self, entry: DecodeRequest) -> None:
        self.queue.remove(entry)
        self.ended[entry.req.rid] = entry
        self._clean_hicache_prefetch_resources(entry)
        self.tree_cache.unlock(entry.req.lock)
        entry.req.lock = None

    def has_pending_deferred_releases(self) -> bool:
        return False


def _scheduler(role: str, engine: SglangEngine) -> Scheduler:
    """SGLang's scheduler, not started: what its arrival, flush, attach and detach look at."""
    scheduler = Scheduler.__new__(Scheduler)
    empty = SimpleNamespace(is_empty=lambda: True, reqs=[])
    values = dict(
        tree_cache=engine.tree,
        req_to_token_pool=engine.tree.req_to_token_pool,
        token_to_kv_pool_allocator=engine.allocator,
        disaggregation_mode=DisaggregationMode(role),
        enable_hierarchical_cache=True,
        enable_hicache_storage=True,
        enable_decode_hicache=True,
        running_batch=empty,
        waiting_queue=[],
        last_batch=None,
        chunked_req=None,
        cur_batch_for_debug=None,
        draft_worker=None,
        decode_offload_manager=None,
        dllm_manager=SimpleNamespace(any_staging_reqs=lambda: False),
        grammar_manager=SimpleNamespace(grammar_queue=[], clear=lambda: None),
        metrics_reporter=SimpleNamespace(reset_metrics=lambda: None, is_stats_logging_rank=False),
        enable_lmcache=False,
        enable_overlap=False,
        enable_hisparse=False,
        _engine_paused=False,
        disagg_prefill_inflight_queue=[],
        disagg_prefill_bootstrap_queue=SimpleNamespace(queue=[]),
    )
    for name, value in values.items():
        setattr(scheduler, name, value)
    scheduler.disagg_decode_transfer_queue = TransferQueue(engine.tree)
    scheduler.disagg_decode_prealloc_queue = PreallocQueue(scheduler)
    return scheduler
