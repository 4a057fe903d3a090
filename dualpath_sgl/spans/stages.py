"""Spans of what SGLang does with host memory: load_back and persist.

They join the ways of KV in the request's trace; SGLang's own spans show its prefill and its sending.
Registered only when traces are exported, with the hooks of joining.py and request_span.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from opentelemetry.trace import Tracer

from dualpath_sgl.spans import joining, request_span
from dualpath_sgl.spans.tracing import is_sampled, record_span, traceparent_of
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


def _record(name: str, traceparent: str | None, begun_ns: int, ended_ns: int, **facts: int | float) -> None:
    if _tracer is not None and traceparent is not None and is_sampled(traceparent):
        attributes = {f"dualpath.{key}": value for key, value in facts.items()}
        record_span(_tracer, name, traceparent, begun_ns, ended_ns, attributes)


# -- load_back: host pool -> device, on a PE (a DE's is `restore`) -----------------------------------


@dataclass
class _LoadBack:
    traceparent: str | None
    tokens: int
    queued_ns: int
    begun_ns: int = 0
    submitted_ns: int = 0
    """When SGLang had handed the copy to the device; a CPU has made it by then."""
    ack: Any = None


_load_backs: dict[Any, _LoadBack] = {}


def after_init_load_back(result: tuple[int, Any] | None, tree: Any, params: Any) -> None:
    if result is None or result[0] <= 0 or params.best_match_node not in tree.ongoing_load_back:
        return
    stats = params.req.time_stats
    if stats.disagg_mode.value == "prefill":
        _load_backs[params.best_match_node] = _LoadBack(traceparent_of(stats), result[0], time.time_ns())


def around_start_loading(original: Callable[..., int], controller: Any) -> int:
    begun_ns = time.time_ns()
    producer = original(controller)
    if _load_backs and producer >= 0:
        _copies_begun(controller.ack_load_queue, begun_ns)
    return producer


@faults.guarded
def _copies_begun(acks: Sequence[Any], begun_ns: int) -> None:
    submitted_ns, ack = time.time_ns(), acks[-1]
    for copied in (_load_backs[node] for node in ack.node_ids if node in _load_backs):
        copied.begun_ns, copied.submitted_ns, copied.ack = begun_ns, submitted_ns, ack


def after_loading_check(_result: None, tree: Any, *_args: Any, **_kwargs: Any) -> None:
    """SGLang looks between two batches, long after a copy may have ended: the device knows better."""
    for node in [node for node in _load_backs if node not in tree.ongoing_load_back]:
        copied = _load_backs.pop(node)
        begun_ns = copied.begun_ns or copied.queued_ns
        ended_ns = time.time_ns()
        if copied.ack is not None and copied.ack.timing_enabled:
            took_ms = copied.ack.start_event.elapsed_time(copied.ack.finish_event)
            ended_ns = min(ended_ns, begun_ns + int(took_ms * 1e6))
        elif str(tree.cache_controller.device) == "cpu":
            ended_ns = copied.submitted_ns or ended_ns
        waited_s = max(0, begun_ns - copied.queued_ns) / 1e9
        _record(
            "load_back", copied.traceparent, begun_ns, ended_ns, tokens=copied.tokens, queue_wait_s=waited_s
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

HOOKS: tuple[tuple[str, Callable, str], ...] = (
    (_TREE + "init_load_back", after_init_load_back, "after"),
    (_TREE + "loading_check", after_loading_check, "after"),
    ("sglang.srt.managers.cache_controller.HiCacheController.start_loading", around_start_loading, "around"),
    (
        "sglang.srt.observability.req_time_stats.SchedulerReqTimeStats.set_completion_time",
        request_span.after_set_completion_time,
        "after",
    ),
    (_TREE + "checkpoint_into_tree", around_checkpoint_into_tree, "around"),
    (_TREE + "_track_write_through_node", after_track_write_through, "after"),
    (_TREE + "write_backup_storage", before_write_backup_storage, "before"),
    (
        "sglang.srt.managers.cache_controller.HiCacheController._page_backup_or_log",
        around_page_backup,
        "around",
    ),
    *joining.HOOKS,
)
