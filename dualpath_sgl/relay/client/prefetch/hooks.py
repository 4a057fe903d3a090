"""Where the client meets SGLang's prefetch.  Without any of these hooks relays help as well, one call at a time.

before_prefetch_kvcache    scheduler thread: which trace a request belongs to
around_prefetch_io         I/O thread, as long as it lives: it looks ahead
around_page_transfer       one operation: when it is over, nothing writes into its memory
around_kv_batch            one call of it: it has begun before, or begins now
around_sidecars            what SGLang reads behind an operation's pages: states, windows
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from dualpath_sgl.relay.client.prefetch.ahead import CallsAhead
from dualpath_sgl.relay.client.prefetch.call import Call, making
from dualpath_sgl.spans import stages
from dualpath_sgl.spans.tracing import traceparent_of
from dualpath_sgl.threads import faults

if TYPE_CHECKING:
    from sglang.srt.managers.cache_controller import HiCacheController, PrefetchOperation
    from sglang.srt.managers.schedule_batch import Req

MOST_TRACES = 4096
"""Of requests that wait for their prefetch; the oldest are forgotten."""

_io_thread = threading.local()
_traces: OrderedDict[str, str] = OrderedDict()
_traces_lock = threading.Lock()


def before_prefetch_kvcache(_scheduler: Any, req: Req, *_args: Any, **_kwargs: Any) -> None:
    traceparent = traceparent_of(req.time_stats)
    if traceparent is None:
        return
    with _traces_lock:
        _traces[req.rid] = traceparent
        while len(_traces) > MOST_TRACES:
            _traces.popitem(last=False)


def _call_of(operation: PrefetchOperation) -> Call:
    with _traces_lock:
        return Call(operation.request_id, _traces.get(operation.request_id))


def around_prefetch_io(original: Callable[..., Any], controller: HiCacheController) -> None:
    """The body of SGLang's prefetch I/O thread."""
    if not getattr(controller.storage_backend, "calls_may_overlap", False):
        original(controller)  # another backend, which is called as upstream calls it
        return
    calls = _io_thread.calls = CallsAhead(controller, _call_of)
    try:
        original(controller)
    finally:
        calls.close()
        del _io_thread.calls


def around_page_transfer(
    original: Callable[..., Any], controller: HiCacheController, operation: PrefetchOperation
) -> Any:
    calls: CallsAhead | None = getattr(_io_thread, "calls", None)
    try:
        return original(controller, operation)
    finally:
        if calls is not None:
            calls.end(operation)


def around_kv_batch(
    original: Callable[..., Any], controller: HiCacheController, operation: PrefetchOperation, *arguments: Any
) -> int:
    calls: CallsAhead | None = getattr(_io_thread, "calls", None)
    read: Callable[..., int] = partial(original, controller)
    return read(operation, *arguments) if calls is None else calls.ask(read, operation, *arguments)


def around_sidecars(
    original: Callable[..., Any], controller: HiCacheController, operation: PrefetchOperation, *arguments: Any
) -> None:
    with making(_call_of(operation)):
        original(controller, operation, *arguments)


_CONTROLLER = "sglang.srt.managers.cache_controller.HiCacheController."

HOOKS: tuple[tuple[str, Callable[..., Any], str], ...] = (
    (_CONTROLLER + "prefetch_io_aux_func", around_prefetch_io, "around"),
    (_CONTROLLER + "_page_transfer", around_page_transfer, "around"),
    (_CONTROLLER + "_page_transfer_kv_batch", around_kv_batch, "around"),
)
TRACED: tuple[tuple[str, Callable[..., Any], str], ...] = (
    (
        "sglang.srt.managers.scheduler.Scheduler._prefetch_kvcache",
        faults.guarded(before_prefetch_kvcache),
        "before",
    ),
    (
        "sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller.HybridCacheController._page_transfer_sidecar",
        around_sidecars,
        "around",
    ),
)


def register(traced: bool) -> None:
    """Hand the hooks to SGLang; `traced`: also those of a request's trace."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, hook, kind in HOOKS + (TRACED if traced else ()):
        HookRegistry.register(target, hook, HookType(kind))
    if traced:
        stages.register()
