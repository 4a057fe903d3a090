"""One request, one tree: in SGLang's HTTP process, before its own root spans begin.

A request that comes without a `traceparent` (SGLang's Rust router makes none) would be a trace on each of its two
engines.  Both know its room: from that they make the same parent, whose span the decode engine exports
(request_span.py).  Health checks and warm-ups are not traced.

Who shall be recorded is the caller's word, in the flags of its `traceparent`, and OpenTelemetry's usual sampler
(`OTEL_TRACES_SAMPLER`) decides about requests without one: by the trace's id, so alike on both engines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from hashlib import blake2b
from typing import Any, NamedTuple

from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import Sampler

from dualpath_sgl.threads import faults
from scheduler_svc.telemetry import span_names


class Ids(NamedTuple):
    trace: int
    span: int


def ids_of_room(room: int) -> Ids:
    """Of a request's whole trace and its root.  They do not tell the room."""
    digest = blake2b(room.to_bytes(8, "big"), digest_size=24, person=b"dualpath-trace").digest()
    return Ids(int.from_bytes(digest[:16], "big"), int.from_bytes(digest[16:], "big"))


@faults.guarded
def header_of_room(room: int) -> dict[str, str]:
    """W3C headers as a client that stands before both engines would send."""
    ids = ids_of_room(room)
    sampled = _sampler().should_sample(Context(), ids.trace, span_names.REQUEST).decision.is_sampled()
    return {"traceparent": f"00-{ids.trace:032x}-{ids.span:016x}-{int(sampled):02x}"}


@cache
def _sampler() -> Sampler:
    return TracerProvider(shutdown_on_exit=False).sampler


def around_init_trace_ctx(
    original: Callable[..., None],
    stats: Any,
    rid: str,
    bootstrap_room: int | None,
    external_trace_header: Mapping[str, str] | None = None,
) -> None:
    joins = bootstrap_room is not None and stats.disagg_mode.value in ("prefill", "decode")
    if joins and "traceparent" not in (external_trace_header or {}):
        external_trace_header = header_of_room(bootstrap_room)
    original(stats, rid, bootstrap_room, external_trace_header)


def around_init_req_state(original: Callable[..., None], manager: Any, obj: Any, *args: Any) -> None:
    if not (manager.enable_trace and _is_probe(obj)):
        return original(manager, obj, *args)
    manager.enable_trace = False
    try:
        return original(manager, obj, *args)
    finally:
        manager.enable_trace = True


def _is_probe(obj: Any) -> bool:
    """A health check or a warm-up: both pretend that their other half is nowhere."""
    from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST

    host = getattr(obj, "bootstrap_host", None)
    return host == FAKE_BOOTSTRAP_HOST or (
        isinstance(host, list) and bool(host) and all(one == FAKE_BOOTSTRAP_HOST for one in host)
    )


HOOKS: tuple[tuple[str, Callable[..., Any], str], ...] = (
    (
        "sglang.srt.observability.req_time_stats.ReqTimeStatsBase.init_trace_ctx",
        around_init_trace_ctx,
        "around",
    ),
    (
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._init_req_state",
        around_init_req_state,
        "around",
    ),
)
