"""Recorded traces, read and checked: a Jaeger JSON file, or spans as the collector writes them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from dualpath_sgl.evals.common.documents import first_problem, read_json
from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.spans import jaeger

Microseconds = Annotated[int, Field(ge=0, lt=2**63)]
JAEGER_S_FORM = "Jaeger's form, as traces.json is (name one with --file)"
COLLECTED = ".jsonl"
"""How a file of spans ends that a running cluster's collector writes."""
OWN_PREFIX = "dualpath."


class Tag(BaseModel):
    key: str
    value: Any = None


class Reference(BaseModel):
    spanID: str
    refType: str = "CHILD_OF"


class Span(BaseModel):
    """Fields that are shown; others are ignored."""

    spanID: str
    operationName: str = ""
    references: list[Reference] = []
    startTime: Microseconds
    duration: Microseconds = 0
    tags: list[Tag] = []
    processID: str = ""

    @property
    def attributes(self) -> dict[str, Any]:
        return {tag.key: tag.value for tag in self.tags}

    @property
    def own(self) -> dict[str, Any]:
        """Attributes that DualPath set, without their prefix."""
        return {
            tag.key.removeprefix(OWN_PREFIX): tag.value for tag in self.tags if tag.key.startswith(OWN_PREFIX)
        }

    @property
    def parents(self) -> list[str]:
        return [found.spanID for found in self.references if found.refType == "CHILD_OF"]

    @property
    def end(self) -> int:
        return self.startTime + self.duration


class Process(BaseModel):
    serviceName: str = "unknown"
    tags: list[Tag] = []


class Trace(BaseModel):
    traceID: str
    spans: Annotated[list[Span], Field(min_length=1)]
    processes: dict[str, Process] = {}

    @property
    def begin(self) -> int:
        """Of its first span, microseconds since 1970."""
        return min(span.startTime for span in self.spans)

    @property
    def duration(self) -> int:
        """From its first span's start to its last one's end, microseconds."""
        return max(span.end for span in self.spans) - self.begin

    def service(self, span: Span) -> str:
        process = self.processes.get(span.processID)
        return (process.serviceName if process else "unknown").removeprefix("dualpath-")

    def resource(self, key: str) -> Any:
        """An attribute of the first process that has it; None where none has."""
        values = (tag.value for process in self.processes.values() for tag in process.tags if tag.key == key)
        return next(values, None)

    def tree(self) -> Iterator[tuple[int, Span]]:
        """Every span once with its depth, parents before children, siblings by start.

        A span whose parent is elsewhere is a root.  Where spans are each other's parents, the first is.
        """
        ids = {span.spanID for span in self.spans}
        children: dict[str | None, list[Span]] = {}
        ordered = sorted(self.spans, key=lambda span: span.startTime)
        for span in ordered:
            parents = [parent for parent in span.parents if parent in ids]
            children.setdefault(parents[0] if parents else None, []).append(span)
        shown: set[int] = set()
        for root in (*children.get(None, []), *ordered):
            stack = [(0, root)]
            while stack:
                depth, span = stack.pop()
                if id(span) in shown:
                    continue
                shown.add(id(span))
                yield depth, span
                stack += [(depth + 1, child) for child in reversed(children.pop(span.spanID, []))]


class _Document(BaseModel):
    data: list[Trace]


def read_traces(file: Path) -> list[Trace]:
    """The traces of a file: Jaeger's JSON, or the collector's lines (`.jsonl`).  Raises EvalError."""
    if not file.exists():
        raise EvalError(
            f"{file}: no such file; name one with --file: traces.json of `dualpath demo` or `dualpath eval "
            "run`, or spans.jsonl of a run directory"
        )
    if file.suffix == COLLECTED:
        return parse(jaeger.traces(jaeger.read_lines(file)))
    document = read_json(file, JAEGER_S_FORM)
    if not isinstance(document, dict) or not isinstance(document.get("data"), list):
        raise EvalError(f"{file}: field data is missing; expected {JAEGER_S_FORM}")
    try:
        return _Document.model_validate(document).data
    except ValidationError as error:
        raise EvalError(f"{file}: {first_problem(error)}; expected {JAEGER_S_FORM}") from None


def parse(documents: list[dict[str, Any]]) -> list[Trace]:
    """Of traces in Jaeger's form, as `jaeger.traces` makes them."""
    return _Document.model_validate({"data": documents}).data


def find(traces: list[Trace], wanted: str) -> Trace:
    """The trace whose id is `wanted` or the only one whose id begins so.  Raises EvalError."""
    wanted = wanted.lower()
    ids = [trace.traceID for trace in traces]
    matches = [trace for trace in traces if wanted and trace.traceID.lower().startswith(wanted)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        some = ", ".join(trace.traceID for trace in matches[:5])
        more = ", …" if len(matches) > 5 else ""
        raise EvalError(f"trace id {wanted!r} fits {len(matches)} traces ({some}{more}); give more digits")
    near = difflib.get_close_matches(wanted, ids, n=3, cutoff=0.3) or difflib.get_close_matches(
        wanted, [trace_id[: len(wanted)] for trace_id in ids], n=3, cutoff=0.3
    )
    hint = f"near: {', '.join(near)}" if near else f"the file holds {len(ids)} traces"
    raise EvalError(f"no trace has the id {wanted!r}; {hint}; --list shows all of them")
