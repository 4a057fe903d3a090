"""Spans of the stages that SGLang itself runs: load_back, prefill, kv_send and persist.

They join `storage.read` and `forward` in the request's trace, so that one waterfall shows where
a request's time went.  Registered only when traces are exported.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from opentelemetry.trace import Tracer

from dualpath_sgl.spans.tracing import record_span, traceparent_of
from dualpath_sgl.threads import faults

_tracer: Tracer | None = None
_registered = False


def follow(tracer: Tracer) -> None:
    """From now on export the stages of this process."""
    global _tracer
    _tracer = tracer


def register() -> None:
    """Hand the hooks to SGLang, once a process."""
    global _registered
    if _registered:
        return
    _registered = True
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, hook, kind in HOOKS:
        HookRegistry.register(target, hook if kind == "around" else faults.guarded(hook), HookType(kind))


def _record(name: str, traceparent: str | None, begun_ns: int, ended_ns: int, **facts: int) -> None:
    if _tracer is not None and traceparent is not None:
        attributes = {f"dualpath.{key}": value for key, value in facts.items()}
        record_span(_tracer, name, traceparent, begun_ns, ended_ns, attributes)


# -- load_back: host pool -> device, until SGLang reaps the copy's acknowledgement -------------------

_load_backs: dict[Any, tuple[str | None, int, int]] = {}


def after_init_load_back(result: tuple[int, Any] | None, tree: Any, params: Any) -> None:
    if result is not None and result[0] > 0 and params.best_match_node in tree.ongoing_load_back:
        traceparent = traceparent_of(params.req.time_stats)
        _load_backs[params.best_match_node] = (traceparent, time.time_ns(), result[0])


def after_loading_check(_result: None, tree: Any, *_args: Any, **_kwargs: Any) -> None:
    for node in [node for node in _load_backs if node not in tree.ongoing_load_back]:
        traceparent, begun_ns, tokens = _load_backs.pop(node)
        _record("load_back", traceparent, begun_ns, time.time_ns(), tokens=tokens)


# -- prefill and kv_send: from SGLang's own time stamps ------------------------------------------------


def _span_of_stage(name: str, begin: str, end: str) -> Callable[..., None]:
    def after_stage(_result: None, stats: Any, *_args: Any, **_kwargs: Any) -> None:
        from sglang.srt.observability.req_time_stats import convert_time_to_realtime_ns

        begun_s, ended_s = getattr(stats, begin), getattr(stats, end)
        if begun_s and ended_s and stats.disagg_mode.value == "prefill":
            _record(
                name,
                traceparent_of(stats),
                convert_time_to_realtime_ns(begun_s),
                convert_time_to_realtime_ns(ended_s),
            )

    return after_stage


after_prefill_finished = _span_of_stage("prefill", "last_forward_entry_time", "prefill_finished_time")
after_kv_sent = _span_of_stage(
    "kv_send", "prefill_transfer_queue_entry_time", "prefill_kv_transfer_finish_time"
)


# -- persist: host pool -> storage, traced back to the request that made the pages -------------------

_inserting: list[str | None] = []
_written_by: dict[Any, str | None] = {}
"""Tree node on its way to the host pool -> trace of the request that made it."""
_stored_by: dict[str, str | None] = {}
"""Last page hash of a node on its way to storage -> the same."""


def around_checkpoint_into_tree(original: Callable, tree: Any, req: Any, **kwargs: Any) -> Any:
    _inserting.append(traceparent_of(req.time_stats))
    try:
        return original(tree, req, **kwargs)
    finally:
        _inserting.pop()


def after_track_write_through(_result: None, tree: Any, node_id: Any, *_args: Any, **_kwargs: Any) -> None:
    if _inserting and node_id in tree.ongoing_write_through:
        for node in tree.ongoing_write_through[node_id].publish_node_ids:
            _written_by[node] = _inserting[-1]


def before_write_backup_storage(tree: Any, node_id: Any) -> None:
    traceparent = _written_by.pop(node_id, None)
    if traceparent is not None:
        _stored_by[tree.get_last_hash_value(node_id)] = traceparent


def around_page_backup(original: Callable, controller: Any, operation: Any) -> None:
    begun_ns = time.time_ns()
    original(controller, operation)
    traceparent = _stored_by.pop(operation.hash_value[-1], None) if operation.hash_value else None
    pages = operation.completed_tokens // controller.page_size
    _record("persist", traceparent, begun_ns, time.time_ns(), pages=pages)


_TREE = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache."
_STATS = "sglang.srt.observability.req_time_stats.SchedulerReqTimeStats."

HOOKS: tuple[tuple[str, Callable, str], ...] = (
    (_TREE + "init_load_back", after_init_load_back, "after"),
    (_TREE + "loading_check", after_loading_check, "after"),
    (_STATS + "set_prefill_finished_time", after_prefill_finished, "after"),
    (_STATS + "set_prefill_kv_transfer_finish_time", after_kv_sent, "after"),
    (_TREE + "checkpoint_into_tree", around_checkpoint_into_tree, "around"),
    (_TREE + "_track_write_through_node", after_track_write_through, "after"),
    (_TREE + "write_backup_storage", before_write_backup_storage, "before"),
    (
        "sglang.srt.managers.cache_controller.HiCacheController._page_backup_or_log",
        around_page_backup,
        "around",
    ),
)
