"""One trace as a waterfall in the terminal, from a Jaeger JSON file."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from evals.errors import EvalError

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


def read_traces(file: Path) -> list[dict[str, Any]]:
    """The traces of a Jaeger JSON file.  Raises EvalError."""
    try:
        document = json.loads(file.read_bytes())
    except OSError as error:
        raise EvalError(f"{file}: cannot be read: {error.strerror}; name a traces.json with --file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise EvalError(f"{file}: not JSON ({error}); expected Jaeger's form, as traces.json is") from None
    if not isinstance(document, dict) or not isinstance(document.get("data"), list):
        raise EvalError(f"{file}: field data is missing; expected Jaeger's form, as traces.json is")
    return document["data"]


def find(traces: list[dict[str, Any]], wanted: str) -> dict[str, Any]:
    """The trace whose id is `wanted` or the only one whose id begins so.  Raises EvalError."""
    wanted = wanted.lower()
    ids = [trace["traceID"] for trace in traces]
    matches = [trace for trace in traces if wanted and trace["traceID"].startswith(wanted)]
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
    services = sorted({process["serviceName"] for process in trace["processes"].values()})
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
        service = trace["processes"][span["processID"]]["serviceName"]
        offset = span["startTime"] - begin
        table.add_row(
            Text("  " * depth + span["operationName"]),
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
        services = {process["serviceName"] for process in trace["processes"].values()}
        table.add_row(
            trace["traceID"],
            Text(root["operationName"]),
            str(len(spans)),
            str(len(services)),
            _ms(end - min(span["startTime"] for span in spans)),
            Text(_attributes(root), style="dim"),
        )
    console.print(table)


def _tree(spans: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Spans with their depth, parents before children, siblings by start."""
    children: dict[str | None, list[dict[str, Any]]] = {}
    for span in spans:
        parent = span["references"][0]["spanID"] if span["references"] else None
        children.setdefault(parent, []).append(span)
    for siblings in children.values():
        siblings.sort(key=lambda span: span["startTime"])
    stack = [(0, span) for span in reversed(children.get(None, []))]
    while stack:
        depth, span = stack.pop()
        yield depth, span
        stack += [(depth + 1, child) for child in reversed(children.get(span["spanID"], []))]


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
