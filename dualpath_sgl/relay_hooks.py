"""Where an engine in relay mode meets SGLang 0.5.23: its load is looked at, and nothing is changed.

Loads themselves go through the storage backend (`relay/client/store.py`).  Each hook does nothing until the
engine stands and leaves health checks and warm-up requests (fake bootstrap hosts) alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dualpath_sgl import relay_engine, runtime
from dualpath_sgl.control.prefill_work import PrefillWork
from dualpath_sgl.control.real_request import is_real
from dualpath_sgl.relay_engine import RelayEngine
from dualpath_sgl.start.config import settings
from dualpath_sgl.threads import faults
from scheduler_svc.wire.protocol import Role

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


def _prefill() -> PrefillWork | None:
    engine = relay_engine.current()
    return engine.prefill if engine is not None and engine.role is Role.PREFILL else None


def _decode() -> RelayEngine | None:
    engine = relay_engine.current()
    return engine if engine is not None and engine.role is Role.DECODE else None


def after_scheduler_init(_result: None, scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
    from sglang.srt.runtime_context import get_disagg

    if runtime.current() is None and get_disagg().disaggregation_mode in tuple(Role):
        relay_engine.start(settings(), scheduler)


def before_prefetch_kvcache(_scheduler: Any, req: Req, *_args: Any, **_kwargs: Any) -> None:
    work = _prefill()
    if work is not None and is_real(req):
        work.arrives(req)


def after_prefetch_kvcache(_result: Any, scheduler: Any, req: Req, *_args: Any, **_kwargs: Any) -> None:
    work = _prefill()
    if work is not None:
        work.arrived(req, scheduler.tree_cache)


def after_sync_prefetch_hit_query(
    hit_tokens: int, controller: Any, operation: Any, _local_hit_tokens: int
) -> None:
    """On SGLang's prefetch thread, once all ranks agree."""
    work = _prefill()
    if work is not None:
        # SGLang loads so much or nothing.
        work.hits_known(
            operation.request_id, hit_tokens if hit_tokens >= controller.prefetch_threshold else 0
        )


def after_check_hicache_events(_result: None, tree: Any) -> None:
    engine = relay_engine.current()
    if engine is not None and engine.role is Role.PREFILL:
        engine.look(tree)


def after_finish(_result: None, _tree: Any, handle: Any, _outcome: Any) -> None:
    work = _prefill()
    if work is not None:
        work.ended(handle.rid)


def after_prealloc_add(
    _result: None, queue: Any, req: Req, is_retracted: bool = False, is_rebootstrap: bool = False
) -> None:
    engine = _decode()
    if engine is None or is_retracted or is_rebootstrap or not is_real(req):
        return
    if any(decode_req.req is req for decode_req in reversed(queue.queue)):
        engine.queued(req)


def before_pop_preallocated(queue: Any, *_args: Any, **_kwargs: Any) -> None:
    engine = _decode()
    if engine is not None:
        engine.look_at_queue(queue)


_BEFORE, _AFTER = "before", "after"
_SRT = "sglang.srt."
_SCHEDULER = _SRT + "managers.scheduler.Scheduler."
_PREALLOC = _SRT + "disaggregation.decode.DecodePreallocQueue."

HOOKS: tuple[tuple[str, Callable, str], ...] = (
    (_SCHEDULER + "__init__", after_scheduler_init, _AFTER),
    (_SCHEDULER + "_prefetch_kvcache", before_prefetch_kvcache, _BEFORE),
    (_SCHEDULER + "_prefetch_kvcache", after_prefetch_kvcache, _AFTER),
    (
        _SRT
        + "mem_cache.hybrid_cache.hybrid_cache_controller.HybridCacheController._sync_prefetch_hit_query",
        after_sync_prefetch_hit_query,
        _AFTER,
    ),
    (
        _SRT + "mem_cache.unified_radix_cache.UnifiedRadixCache.check_hicache_events",
        after_check_hicache_events,
        _AFTER,
    ),
    (_SRT + "mem_cache.base_prefix_cache.BasePrefixCache.finish", after_finish, _AFTER),
    (_PREALLOC + "add", after_prealloc_add, _AFTER),
    (_PREALLOC + "pop_preallocated", before_pop_preallocated, _BEFORE),
)
"""Without one of them the scheduler knows less of this engine's load, and no request is the worse for it."""


def register() -> None:
    """Hand every hook to SGLang; it applies them after all plugins have run."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, hook, kind in HOOKS:
        HookRegistry.register(target, faults.guarded(hook), HookType(kind))
