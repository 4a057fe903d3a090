"""Where a prefill engine's prompts pass SGLang 0.5.23: looked at, nothing changed.

Each hook does nothing until the rank counts, and leaves health checks and warm-up requests (fake bootstrap hosts)
alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dualpath_sgl.control.real_request import is_real
from dualpath_sgl.metrics import rank
from dualpath_sgl.threads import faults

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


def before_prefetch_kvcache(_scheduler: Any, req: Req, *_args: Any, **_kwargs: Any) -> None:
    metrics = rank.current()
    if metrics is not None and is_real(req):
        metrics.prompts.arrives(req)


def after_prefetch_kvcache(_result: Any, _scheduler: Any, req: Req, *_args: Any, **_kwargs: Any) -> None:
    metrics = rank.current()
    if metrics is not None:
        metrics.prompts.matched(req.rid, req.storage_prefetch_last_match_len or 0)


def after_sync_prefetch_hit_query(
    hit_tokens: int, controller: Any, operation: Any, _local_hit_tokens: int
) -> None:
    """On SGLang's prefetch thread, once all ranks agree.  SGLang loads at least its threshold, or nothing."""
    metrics = rank.current()
    if metrics is not None and hit_tokens >= controller.prefetch_threshold:
        metrics.prompts.found(operation.request_id, hit_tokens)


def after_finish(_result: None, _tree: Any, handle: Any, outcome: Any) -> None:
    metrics = rank.current()
    if metrics is not None:
        from sglang.srt.mem_cache.base_prefix_cache import CacheRequestOutcome

        metrics.prompts.over(handle.rid, was_served=outcome is CacheRequestOutcome.SUCCESS)


_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler."
_CACHE = "sglang.srt.mem_cache."
HOOKS: tuple[tuple[str, Callable, str], ...] = (
    (_SCHEDULER + "_prefetch_kvcache", before_prefetch_kvcache, "before"),
    (_SCHEDULER + "_prefetch_kvcache", after_prefetch_kvcache, "after"),
    (
        _CACHE + "hybrid_cache.hybrid_cache_controller.HybridCacheController._sync_prefetch_hit_query",
        after_sync_prefetch_hit_query,
        "after",
    ),
    (_CACHE + "base_prefix_cache.BasePrefixCache.finish", after_finish, "after"),
)


def register() -> None:
    """Hand every hook to SGLang; it applies them after all plugins have run."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, hook, kind in HOOKS:
        HookRegistry.register(target, faults.guarded(hook), HookType(kind))
