"""The span `request PATH`: a whole request, exported by its decode engine when it is complete.

It carries what became of the request's KV on both engines.  For a request without a caller's trace it is the root
(joining.py); else it stands below SGLang's own span of the decode engine.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opentelemetry.context import Context
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer

from dualpath_sgl.spans.joining import Ids, ids_of_room
from dualpath_sgl.spans.tracing import is_sampled
from scheduler_svc.decision_spans import loaded_attributes
from scheduler_svc.telemetry import span_names
from scheduler_svc.telemetry.tracing import context_from, init_tracing
from scheduler_svc.wire.protocol import Loaded, Plan

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

SERVICE = "dualpath"
MOST_OPEN = 10_000
"""Requests remembered; the oldest is forgotten when its end never came."""


class ChosenIds(RandomIdGenerator):
    """Random ids, but for a root whose ids are `chosen`; for one thread."""

    def __init__(self) -> None:
        self.chosen: Ids | None = None

    def generate_trace_id(self) -> int:
        return self.chosen.trace if self.chosen else super().generate_trace_id()

    def generate_span_id(self) -> int:
        return self.chosen.span if self.chosen else super().generate_span_id()


@dataclass
class _Open:
    req: weakref.ref[Req]
    traceparent: str
    room: int
    begun_ns: int
    path: str
    """Until a plan is known, what the engine's mode says."""
    plan: Plan | None = None
    fallback: str | None = None
    loaded: Loaded | None = None


class RequestSpans:
    """`begin`, `decided` and `end` on SGLang's scheduler thread, `loaded` on the control channel's."""

    def __init__(self, tracer: Tracer, ids: ChosenIds, path: str) -> None:
        self._tracer = tracer
        self._ids = ids
        self._path = path
        self._open: OrderedDict[int, _Open] = OrderedDict()
        """By room."""
        self._lock = threading.Lock()

    def begin(self, req: Req, traceparent: str | None) -> None:
        """A request has come to the decode engine."""
        if traceparent is None or not is_sampled(traceparent):
            return
        begun_ns = req.time_stats.trace_ctx.start_time_ns or time.time_ns()
        opened = _Open(weakref.ref(req), traceparent, req.bootstrap_room, begun_ns, self._path)
        with self._lock:
            self._open.setdefault(req.bootstrap_room, opened)
            if len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)

    def decided(self, room: int, plan: Plan | None, fallback: str | None) -> None:
        """What the decode engine goes by."""
        opened = self._open.get(room)
        if opened is not None:
            opened.plan, opened.fallback = plan, fallback
            opened.path = plan.shown_path if plan is not None else "unplanned"

    def loaded(self, message: Loaded) -> None:
        opened = self._open.get(message.room)
        if opened is not None:
            opened.loaded = message

    def end(self, room: int, req_id: str | None = None) -> None:
        """The request is complete, or was aborted; nothing for one that is not known.

        `req_id`: only if the room is this request's.
        """
        with self._lock:
            opened = self._open.get(room)
            req = opened.req() if opened is not None else None
            if opened is None or (req_id is not None and req is not None and req.rid != req_id):
                return
            del self._open[room]
        self._export(opened, req)

    def _export(self, opened: _Open, req: Req | None) -> None:
        trace_id = int(opened.traceparent.split("-")[1], 16)
        ids = ids_of_room(opened.room)
        is_root = trace_id == ids.trace
        self._ids.chosen = ids if is_root else None
        try:
            span = self._tracer.start_span(
                f"{span_names.REQUEST} {opened.path}",
                context=Context() if is_root else context_from(opened.traceparent),
                kind=SpanKind.SERVER if is_root else SpanKind.INTERNAL,
                start_time=opened.begun_ns,
                attributes=_facts(opened, req),
            )
        finally:
            self._ids.chosen = None
        if reasons := _fallbacks(opened):
            span.set_attribute("error.type", "dualpath.fallback")
            span.set_status(Status(StatusCode.ERROR, "; ".join(reasons)))
        span.end()


def _fallbacks(opened: _Open) -> list[str]:
    """Of both sides, each once."""
    said = [
        *(opened.loaded.fallbacks if opened.loaded else ()),
        *([opened.fallback] if opened.fallback else []),
    ]
    return list(dict.fromkeys(said))


def _facts(opened: _Open, req: Req | None) -> dict[str, str | int]:
    facts: dict[str, str | int] = {
        "gen_ai.operation.name": "text_completion",
        "dualpath.room": str(opened.room),
        "dualpath.path": opened.path,
    }
    if req is not None:
        facts |= {
            "gen_ai.usage.input_tokens": len(req.origin_input_ids),
            "gen_ai.usage.output_tokens": len(req.output_ids),
        }
    if (plan := opened.plan) is not None:
        facts |= {
            "dualpath.split.pages": plan.split_page,
            "dualpath.hit.pages": plan.hit_pages,
            "dualpath.prefill.engine": plan.prefill_id,
            "dualpath.decode.engine": plan.decode_id,
        }
    if opened.loaded is not None:
        facts = loaded_attributes(opened.loaded) | facts
    if reasons := _fallbacks(opened):
        facts["dualpath.fallback.reason"] = "; ".join(reasons)
    return facts


_current: RequestSpans | None = None


def follow(otlp_endpoint: str | None, engine_id: str, path: str = "") -> RequestSpans | None:
    """From now on export them in this process, the leader rank of a decode engine; None without an endpoint."""
    global _current
    if otlp_endpoint is not None:
        ids = ChosenIds()
        attributes = {"service.instance.id": engine_id}
        _current = RequestSpans(init_tracing(SERVICE, otlp_endpoint, attributes, ids), ids, path)
    return _current


def after_set_completion_time(_result: None, stats: Any, *_args: Any, **_kwargs: Any) -> None:
    trace = stats.trace_ctx
    if _current is not None and trace.tracing_enable and trace.bootstrap_room is not None:
        _current.end(trace.bootstrap_room, trace.rid)
