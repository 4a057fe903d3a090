"""Where DualPath meets SGLang 0.5.23: one hook per method, registered only when it is enabled.

In mode relay these are few (`NAMING`): bytes in the store have right names, and an engine does not run without
its backend.  All others are of decode-side loads.

A request's way is the order of the functions here.  PE: it arrives (`before_prefetch_kvcache`), its stored
prefix is known (`after_sync_prefetch_hit_query`), it has host memory (`around_prefetch_io`), SGLang is through
with it (`after_finish`).  DE: it is queued (`after_prealloc_add`), looked at once an iteration
(`before_pop_preallocated`), has host memory (`around_prefetch_io`), SGLang takes its pages
(`before_handle_prefetch_result`) and restores them.

Each of these does nothing until the engine's runtime exists, as it never does in mode relay, and leaves health
checks and warm-up requests (fake bootstrap hosts) alone.
"""

from __future__ import annotations

from collections.abc import Callable
from queue import Empty
from typing import TYPE_CHECKING, Any

from dualpath_sgl import runtime
from dualpath_sgl.control.real_request import is_real
from dualpath_sgl.decode import DecodeSide
from dualpath_sgl.experimental import attention_quota
from dualpath_sgl.lanes.page_load import acknowledge
from dualpath_sgl.lanes.rank_sync import meet
from dualpath_sgl.pools import key_tag, weights
from dualpath_sgl.pools.device_memory import free_tokens
from dualpath_sgl.pools.host_tree import holds_only_kv
from dualpath_sgl.prefill import PrefillSide
from dualpath_sgl.start.config import settings
from dualpath_sgl.threads import faults
from scheduler_svc.wire.protocol import Mode

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

IO_POLL_S = 0.02
"""How long the prefetch I/O thread sleeps when no operation arrives."""


def _prefill() -> PrefillSide | None:
    current = runtime.current()
    side = current.side if current is not None else None
    return side if isinstance(side, PrefillSide) else None


def _decode() -> DecodeSide | None:
    current = runtime.current()
    side = current.side if current is not None else None
    return side if isinstance(side, DecodeSide) else None


# -- both: the engine stands -------------------------------------------------------------------------


def after_scheduler_init(_result: None, scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
    """However its cache was chosen: an engine that was asked for DualPath does not run without it.

    Only a decode engine in mode relay needs nothing of it.
    """
    from sglang.srt.runtime_context import get_disagg

    controller = getattr(scheduler.tree_cache, "cache_controller", None)
    mode = getattr(getattr(controller, "storage_backend", None), "dualpath_mode", None)
    may_do_without = (
        get_disagg().disaggregation_mode == "decode" and settings().asked_mode is not Mode.DECODE_SIDE
    )
    if mode is None and not may_do_without:
        raise RuntimeError(
            "DUALPATH_ENABLED is 1, but SGLang built no HiCache storage backend for this model; run "
            "`dualpath doctor` with the engine's flags, or unset DUALPATH_ENABLED to run it without DualPath"
        )


# -- PE: arrival ---------------------------------------------------------------------------------


def before_prefetch_kvcache(scheduler: Any, req: Req, *_args: Any, **_kwargs: Any) -> None:
    side = _prefill()
    if side is not None and is_real(req):
        side.begin(req, holds_only_kv(scheduler.tree_cache))


def after_prefetch_kvcache(_result: Any, scheduler: Any, req: Req, *_args: Any, **_kwargs: Any) -> None:
    side = _prefill()
    if side is not None and not scheduler.tree_cache.has_ongoing_prefetch(req.cache_request_handle):
        side.not_registered(req.rid, req.storage_prefetch_last_match_len or 0)


def before_submit_prefetch(
    _controller: Any,
    handle: Any,
    _key: Any,
    _last_hash: Any,
    _prefix_keys: Any,
    matched_prefix_tokens: Any,
    *_args: Any,
    **_kwargs: Any,
) -> None:
    side = _prefill()
    if side is not None:
        side.matched(handle.rid, len(matched_prefix_tokens or ()))


def after_sync_prefetch_hit_query(
    hit_tokens: int, controller: Any, operation: Any, _local_hit_tokens: int
) -> None:
    """On SGLang's prefetch thread, once all ranks agree."""
    side = _prefill()
    if side is not None:
        side.hits_known(operation, hit_tokens, controller.prefetch_threshold)


def after_bootstrap_add(_result: None, queue: Any, req: Req, *_args: Any, **_kwargs: Any) -> None:
    # A prompt longer than the device's memory is refused here without being finished: its prefetch
    # would stay, and the request count as work, for ever.
    side = _prefill()
    if side is not None and side.holds(req.rid) and req.finished():
        from sglang.srt.mem_cache.base_prefix_cache import CacheRequestOutcome

        queue.scheduler.tree_cache.finish(req.cache_request_handle, CacheRequestOutcome.ABORT)


def before_revoke(tree: Any, handle: Any) -> None:
    side = _prefill()
    if side is None or (info := tree.ongoing_prefetch.get(handle)) is None:
        return
    if info.operation.deadline_expired:
        side.revoked(handle.rid, "prefetch deadline passed")
    elif not info.operation.is_terminated():
        side.revoked(handle.rid, "no host memory")
    elif tree.prefetch_stop_policy == "best_effort":
        side.revoked(handle.rid, "prefetch cut short")
    # else the request was aborted, and is finished with next


def after_finish(_result: None, _tree: Any, handle: Any, outcome: Any) -> None:
    side = _prefill()
    if side is not None:
        from sglang.srt.mem_cache.base_prefix_cache import CacheRequestOutcome

        side.forget(handle.rid, aborted=outcome is not CacheRequestOutcome.SUCCESS)


# -- both: once an iteration of SGLang's scheduler loop ----------------------------------------------


def after_check_hicache_events(_result: None, tree: Any) -> None:
    current = runtime.current()
    if current is not None:
        current.workload.device_free_tokens = free_tokens(tree)
    side = _decode()
    if side is not None:
        side.work.count()


# -- both: the prefetch I/O thread becomes a dispatcher to the lanes ---------------------------------


def around_prefetch_io(original: Callable, controller: Any) -> None:
    """The body of SGLang's prefetch I/O thread, which gets every prefetch that has host memory."""
    current = runtime.current()
    if current is None:
        return original(controller)
    current.rank_sync.open()
    prefill = _prefill()
    while not controller.storage_stop_event.is_set():
        try:
            operation = controller.prefetch_buffer.get(timeout=IO_POLL_S)
        except Empty:
            operation = None
        if operation is not None:
            if controller.prefetch_completion_sync_groups:
                current.rank_sync.admit(operation)
            _take_operation(current.side, controller, operation)
        if prefill is not None:
            faults.guarded(prefill.start_overdue)()
    return None


def _take_operation(side: PrefillSide | DecodeSide, controller: Any, operation: Any) -> None:
    """SGLang gets the operation's memory back, whatever happens."""
    try:
        side.take_operation(controller, operation)
    except Exception:
        faults.record("request %s is computed without its stored pages", operation.request_id)
        acknowledge(controller, operation, 0)


def around_prefetch_sync(original: Callable, controller: Any) -> None:
    current = runtime.current()
    if current is None or not controller.prefetch_completion_sync_groups:
        return original(controller)
    return current.rank_sync.run(controller)


# -- DE ------------------------------------------------------------------------------------------


def after_prealloc_add(
    _result: None, queue: Any, req: Req, is_retracted: bool = False, is_rebootstrap: bool = False
) -> None:
    side = _decode()
    if side is None or is_retracted or is_rebootstrap or not is_real(req):
        return
    if any(decode_req.req is req for decode_req in reversed(queue.queue)):
        side.add(queue, req)


def before_pop_preallocated(queue: Any, *_args: Any, **_kwargs: Any) -> None:
    side = _decode()
    if side is None:
        return
    if queue.admission_gate is None:  # the storage may be attached long after the queue was made
        queue.admission_gate = side.admits
        side.work.follow(queue)
    side.tick(queue)


def after_apply_storage_config(_result: None, attachment: Any, **_config: Any) -> None:
    if _decode() is not None:
        # A promise is kept whatever its size.  Below SGLang's threshold (10 tokens: several pages, where
        # they are small) it would not load host pages back, and the request would fail.
        attachment._cache.load_back_threshold = 1


def around_query_storage_hit_length(original: Callable, tree: Any, *args: Any, **kwargs: Any) -> int:
    # The planned share is in the host tree by now; any other page comes from the PE.
    return 0 if _decode() is not None else original(tree, *args, **kwargs)


# -- both: SGLang takes pages, drops its cache, or stops its storage threads -------------------------


def before_handle_prefetch_result(_tree: Any, operation: Any) -> None:
    side = _decode()
    if side is not None:
        side.give_back(operation.request_id)


def before_retire_prefetch(_tree: Any, handle: Any, host_indices: Any, *_args: Any, **_kwargs: Any) -> None:
    side = _decode()
    if side is not None and host_indices is not None:
        side.give_back(handle.rid)


def before_tree_reset(tree: Any) -> None:
    current = runtime.current()
    if current is not None:
        was_idle = not len(current.loads.open)
        current.quiesce()
        if current.tp_size > 1:
            meet()
        if was_idle:
            current.pool_check.before_flush(tree)


def after_stop_storage_threads(_result: None, _controller: Any) -> None:
    # Only now no thread of SGLang's can hand a lane another load.
    current = runtime.current()
    if current is not None:
        current.quiesce()


# -- DE: from the promise to the load-back -----------------------------------------------------------


def before_start_hicache_prefetch(queue: Any, req: Req, match: Any) -> None:
    side = _decode()
    if side is not None:
        side.restores.promise(queue.tree_cache, req, match)


def after_queue_load_back(queued: bool, _queue: Any, request: Any) -> None:
    side = _decode()
    if side is not None and queued:
        side.restores.load_back_queued(request)


def before_clean_prefetch_resources(_queue: Any, request: Any) -> None:
    side = _decode()
    if side is not None:
        side.restores.give_up(request)


def after_process_restores(_result: None, _queue: Any, requests: Any) -> None:
    side = _decode()
    if side is not None:
        side.restores.look(requests)


_AROUND, _BEFORE, _AFTER = "around", "before", "after"
_SRT = "sglang.srt."
_SCHEDULER = _SRT + "managers.scheduler.Scheduler."
_CONTROLLER = _SRT + "mem_cache.hybrid_cache.hybrid_cache_controller.HybridCacheController."
_TREE = _SRT + "mem_cache.unified_radix_cache.UnifiedRadixCache."
_PREALLOC = _SRT + "disaggregation.decode.DecodePreallocQueue."
_MIXIN = _SRT + "disaggregation.decode_hicache_mixin."

NAMING: tuple[tuple[str, Callable, str], ...] = (
    (_SCHEDULER + "__init__", after_scheduler_init, _AFTER),
    (
        _SRT + "managers.cache_controller.HiCacheController._generate_storage_config",
        key_tag.after_generate_storage_config,
        _AFTER,
    ),
    *weights.HOOKS,
)
"""Of every mode."""

HOOKS: tuple[tuple[str, Callable, str], ...] = (
    *NAMING,
    (_SCHEDULER + "maybe_init_dynamic_chunk_sizer", attention_quota.after_init_chunk_sizer, _AFTER),
    (_SCHEDULER + "get_prefill_adder_class", attention_quota.after_get_prefill_adder_class, _AFTER),
    (_SCHEDULER + "_prefetch_kvcache", before_prefetch_kvcache, _BEFORE),
    (_SCHEDULER + "_prefetch_kvcache", after_prefetch_kvcache, _AFTER),
    (_CONTROLLER + "submit_prefetch", before_submit_prefetch, _BEFORE),
    (_CONTROLLER + "_sync_prefetch_hit_query", after_sync_prefetch_hit_query, _AFTER),
    (_SRT + "disaggregation.prefill.PrefillBootstrapQueue.add", after_bootstrap_add, _AFTER),
    (_SRT + "mem_cache.base_prefix_cache.BasePrefixCache.finish", after_finish, _AFTER),
    (_SRT + "managers.cache_controller.HiCacheController.prefetch_io_aux_func", around_prefetch_io, _AROUND),
    (_CONTROLLER + "prefetch_sync_thread_func", around_prefetch_sync, _AROUND),
    (_TREE + "check_hicache_events", after_check_hicache_events, _AFTER),
    (
        _SRT + "mem_cache.unified_cache.storage_attachment.StorageAttachment.apply_runtime_config",
        after_apply_storage_config,
        _AFTER,
    ),
    (_PREALLOC + "add", after_prealloc_add, _AFTER),
    (_PREALLOC + "pop_preallocated", before_pop_preallocated, _BEFORE),
    (_TREE + "query_storage_hit_length", around_query_storage_hit_length, _AROUND),
    (_TREE + "revoke_pending_prefetch", before_revoke, _BEFORE),
    (_TREE + "_handle_prefetch_result", before_handle_prefetch_result, _BEFORE),
    (_TREE + "_retire_ongoing_prefetch", before_retire_prefetch, _BEFORE),
    (_TREE + "reset", before_tree_reset, _BEFORE),
    (_CONTROLLER + "_stop_storage_threads", after_stop_storage_threads, _AFTER),
    (_MIXIN + "DecodeHiCachePreallocMixin._start_hicache_prefetch", before_start_hicache_prefetch, _BEFORE),
    (_MIXIN + "DecodeHiCacheTransferMixin._try_hicache_queue_load_back", after_queue_load_back, _AFTER),
    (
        _MIXIN + "DecodeHiCacheTransferMixin._clean_hicache_prefetch_resources",
        before_clean_prefetch_resources,
        _BEFORE,
    ),
    (
        _MIXIN + "DecodeHiCacheTransferMixin._process_hicache_local_restores",
        after_process_restores,
        _AFTER,
    ),
)


_SGLANG_MUST_NOT_GO_ON = (
    before_handle_prefetch_result,
    before_retire_prefetch,
    before_tree_reset,
    after_stop_storage_threads,
    after_scheduler_init,
    key_tag.after_generate_storage_config,
    *weights.MUST_NOT_FAIL,
)
"""Without one of these, memory may be written to that SGLang gives away next, bytes have a wrong name, or an
engine runs that was to be refused."""


def register(decode_side: bool) -> None:
    """Hand hooks to SGLang; it applies them after all plugins have run.  `decode_side`: loads may be that."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, hook, kind in HOOKS if decode_side else NAMING:
        as_it_is = kind == _AROUND or hook in _SGLANG_MUST_NOT_GO_ON
        HookRegistry.register(target, hook if as_it_is else faults.guarded(hook), HookType(kind))


def assert_applied() -> None:
    """SGLang only logs a hook that could not be applied; DualPath must not run without one.

    Raises RuntimeError naming the missing targets.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    needed = NAMING if settings().asked_mode is Mode.RELAY else HOOKS
    wanted = {target for target, _, _ in needed} | set(HookRegistry._hooks)
    missing = sorted(wanted - HookRegistry._patched)
    if missing:
        raise RuntimeError(
            f"hooks were not applied to {', '.join(missing)}; is this SGLang 0.5.23, and does "
            "SGLANG_PLUGINS admit 'dualpath'?"
        )
