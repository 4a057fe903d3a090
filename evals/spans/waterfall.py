"""One trace as a waterfall in the terminal, from a Jaeger JSON file."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dualpath_sgl.evals.common.documents import first_problem, read_json
from dualpath_sgl.evals.common.errors import EvalError

Microseconds = Annotated[int, Field(ge=0, lt=2**63)]
MOST_INDENTED = 20
"""Levels; deeper ones stand below each other."""
BAR_WIDTH = 32
NARROW_BAR_WIDTH = 12
NARROW_CONSOLE = 120
"""Columns; below that the bars are short, so that names and attributes stay readable."""
_SHOWN = (
    "dualpath.path",
    "dualpath.split.pages",
    "dualpath.hit.pages",
    "dualpath.fallback.reason",
    "dualpath.session",
    "dualpath.turn",
    "lane",
    "bytes",
    "pages",
    "queue_s",
    "error",
    "warning",
)
"""Attributes worth a place on the line; a name matches with or without its `dualpath.` prefix."""
_COLOURS = ("cyan", "green", "magenta", "yellow", "blue", "red")


JAEGER_S_FORM = "Jaeger's form, as traces.json is (name one with --file)"


class _Tag(BaseModel):
    key: str
    value: Any = None


class _Reference(BaseModel):
    spanID: str


class _Span(BaseModel):
    """Fields that are shown; others are ignored."""

    spanID: str
    operationName: str = ""
    references: list[_Reference] = []
    startTime: Microseconds
    duration: Microseconds = 0
    tags: list[_Tag] = []
    processID: str = ""


class _Process(BaseModel):
    serviceName: str = "unknown"


class _Trace(BaseModel):
    traceID: str
    spans: Annotated[list[_Span], Field(min_length=1)]
    processes: dict[str, _Process] = {}


class _Document(BaseModel):
    data: list[_Trace]


def read_traces(file: Path) -> list[dict[str, Any]]:
    """The traces of a Jaeger JSON file.  Raises EvalError."""
    document = read_json(file, JAEGER_S_FORM)
    if not isinstance(document, dict) or not isinstance(document.get("data"), list):
        raise EvalError(f"{file}: field data is missing; expected {JAEGER_S_FORM}")
    try:
        return _Document.model_validate(document).model_dump()["data"]
    except ValidationError as error:
        raise EvalError(f"{file}: {first_problem(error)}; expected {JAEGER_S_FORM}") from None


def find(traces: list[dict[str, Any]], wanted: str) -> dict[str, Any]:
    """The trace whose id is `wanted` or the only one whose id begins so.  Raises EvalError."""
    wanted = wanted.lower()
    ids = [trace["traceID"] for trace in traces]
    matches = [trace for trace in traces if wanted and trace["traceID"].lower().startswith(wanted)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        some = ", ".join(trace["traceID"] for trace in matches[:5])
        raise EvalError(f"trace id {wanted!r} fits {len(matches)} traces ({some}, …); give more digits")
    near = difflib.get_close_matches(wanted, ids, n=3, cutoff=0.3) or difflib.get_close_matches(
        wanted, [trace_id[: len(wanted)] for trace_id in ids], n=3, cutoff=0.3
    )
    hint = f"near: {', '.join(near)}" if near else f"the file holds {len(ids)} traces"
    raise EvalError(f"no trace has the id {wanted!r}; {hint}; --list shows all of them")


def show(trace: dict[str, Any], console: Console) -> None:
    """Print the spans as a tree, each with its place on the trace's time line."""
    spans = trace["spans"]
    begin = min(span["startTime"] for span in spans)
    total = max(1, max(span["startTime"] + span["duration"] for span in spans) - begin)
    services = sorted({_service(trace, span) for span in spans})
    colours = {service: _COLOURS[index % len(_COLOURS)] for index, service in enumerate(services)}

    console.print(f"trace {trace['traceID']}  {len(spans)} spans  {len(services)} services  {_ms(total)}")
    table = Table(box=None, pad_edge=False, header_style="dim")
    bar_width = NARROW_BAR_WIDTH if console.width < NARROW_CONSOLE else BAR_WIDTH
    table.add_column("operation", no_wrap=True)
    table.add_column("service", no_wrap=True)
    table.add_column("start", justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, width=bar_width)
    table.add_column("attributes", overflow="fold", ratio=1)
    for depth, span in _tree(spans):
        service = _service(trace, span)
        offset = span["startTime"] - begin
        table.add_row(
            Text("  " * min(depth, MOST_INDENTED) + span["operationName"]),
            Text(service, style=colours[service]),
            _ms(offset),
            _ms(span["duration"]),
            Text(_bar(offset, span["duration"], total, bar_width), style=colours[service]),
            Text(_attributes(span), style="dim"),
        )
    console.print(table)


def list_traces(traces: list[dict[str, Any]], console: Console) -> None:
    """Print one line per trace."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("trace", "root", "spans", "services", "time", "attributes"):
        table.add_column(column, overflow="fold", no_wrap=column == "trace")
    for trace in traces:
        spans = trace["spans"]
        root = next(span for _, span in _tree(spans))
        end = max(span["startTime"] + span["duration"] for span in spans)
        services = {_service(trace, span) for span in spans}
        table.add_row(
            trace["traceID"],
            Text(root["operationName"]),
            str(len(spans)),
            str(len(services)),
            _ms(end - min(span["startTime"] for span in spans)),
            Text(_attributes(root), style="dim"),
        )
    console.print(table)


def _service(trace: dict[str, Any], span: dict[str, Any]) -> str:
    return trace["processes"].get(span["processID"], {}).get("serviceName", "unknown")


def _tree(spans: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every span once with its depth, parents before children, siblings by start.

    A span whose parent is elsewhere is a root.  Of spans that are each other's parents, the first one is.
    """
    ids = {span["spanID"] for span in spans}
    children: dict[str | None, list[dict[str, Any]]] = {}
    ordered = sorted(spans, key=lambda span: span["startTime"])
    for span in ordered:
        parents = [found["spanID"] for found in span["references"] if found["spanID"] in ids]
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
            stack += [(depth + 1, child) for child in reversed(children.pop(span["spanID"], []))]


def _attributes(span: dict[str, Any]) -> str:
    values = {tag["key"]: tag["value"] for tag in span["tags"]}
    parts = []
    for name in _SHOWN:
        for key in dict.fromkeys((name, f"dualpath.{name}")):
            if key in values:
                parts.append(f"{key.removeprefix('dualpath.')}={_short(values[key])}")
    return " ".join(parts)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _bar(offset: int, duration: int, total: int, width: int) -> str:
    first = min(width - 1, offset * width // total)
    length = max(1, min(width - first, round(duration * width / total)))
    return " " * first + "━" * length


def _ms(microseconds: int) -> str:
    return f"{microseconds / 1000:.1f} ms"
