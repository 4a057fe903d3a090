"""Traces for scripts: what `dualpath trace show --json` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from dualpath_sgl.evals.spans.requests import RequestFacts
from dualpath_sgl.evals.spans.traces import Trace


class SpanDocument(BaseModel):
    id: str
    parent: str | None
    """A span of the same trace; None for a root."""
    name: str
    service: str
    start_s: float
    """Since the trace's first span began."""
    duration_s: float
    attributes: dict[str, Any]


class TraceDocument(RequestFacts):
    """The facts of the list, and every span in the order of the tree."""

    tree: list[SpanDocument]


class ListDocument(BaseModel):
    file: str
    traces: list[RequestFacts]


def trace_document(trace: Trace) -> TraceDocument:
    ids = {span.spanID for span in trace.spans}
    return TraceDocument(
        **RequestFacts.of(trace).model_dump(),
        tree=[
            SpanDocument(
                id=span.spanID,
                parent=next((parent for parent in span.parents if parent in ids), None),
                name=span.operationName,
                service=trace.service(span),
                start_s=(span.startTime - trace.begin) / 1e6,
                duration_s=span.duration / 1e6,
                attributes=span.attributes,
            )
            for _, span in trace.tree()
        ],
    )


def list_document(file: str, traces: Sequence[Trace], everything: bool) -> ListDocument:
    facts = [RequestFacts.of(trace) for trace in traces]
    return ListDocument(file=file, traces=[one for one in facts if one.request or everything])
