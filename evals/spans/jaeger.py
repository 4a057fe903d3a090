"""OTLP JSON lines, as the collector writes them, to the JSON form that Jaeger's UI opens.

Jaeger's form: `{"data": [{"traceID", "spans": [...], "processes": {...}}]}`, times in
microseconds since 1970, one process per service and resource.  Open it in Jaeger's UI under
Search -> Upload.

As Jaeger's own server writes it for its pages, integers that JavaScript would round are text, and a span that is
linked to another one follows from it.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dualpath_sgl.evals.spans import otlp

logger = logging.getLogger(__name__)

_KINDS = {1: "internal", 2: "server", 3: "client", 4: "producer", 5: "consumer"}
_STATUS_ERROR = 2
_EXACT_IN_JAVASCRIPT = 2**53 - 1


def convert(spans_files: Iterable[Path], out: Path, skipped: list[str] | None = None) -> int:
    """Write the spans of `spans_files` (OTLP JSON lines) to `out` in Jaeger's form.

    Returns the number of traces.  Broken lines and spans are left out: one sentence each goes to
    `skipped`, or a warning to the log.  Raises EvalError when a file cannot be read.
    """
    document = {"data": traces(request for file in spans_files for request in read_lines(file, skipped))}
    out.write_text(json.dumps(document, separators=(",", ":")) + "\n")
    return len(document["data"])


def read_lines(spans_file: Path, skipped: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Export requests of a file with what of them is whole; see `convert` for the rest."""
    left_out: list[str] = []
    yield from otlp.read_lines(spans_file, left_out)
    if skipped is not None:
        skipped += left_out
    elif left_out:
        logger.warning("%d broken lines or spans left out, the first: %s", len(left_out), left_out[0])


def traces(requests: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Jaeger traces of OTLP export requests, ordered by their first span's start."""
    by_trace: dict[str, _Trace] = {}
    for request in requests:
        for resource in request.get("resourceSpans", ()):
            attributes = _tags(resource.get("resource", {}).get("attributes", ()))
            for scope in resource.get("scopeSpans", ()):
                name = scope.get("scope", {}).get("name")
                for span in scope.get("spans", ()):
                    by_trace.setdefault(span["traceId"], _Trace(span["traceId"])).add(span, attributes, name)
    found = [trace.document() for trace in by_trace.values()]
    return sorted(found, key=lambda trace: trace["spans"][0]["startTime"])


class _Trace:
    """The spans of one trace; a span that was exported twice counts once."""

    def __init__(self, trace_id: str):
        self._id = trace_id
        self._spans: dict[str, dict[str, Any]] = {}
        self._parents: dict[str, str] = {}
        self._processes: dict[str, tuple[str, dict[str, Any]]] = {}

    def add(self, span: dict[str, Any], resource: list[dict[str, Any]], scope: str | None) -> None:
        start_ns, end_ns = int(span["startTimeUnixNano"]), int(span["endTimeUnixNano"])
        tags = _tags(span.get("attributes", ()))
        if kind := _KINDS.get(span.get("kind", 0)):
            tags.append(_tag("span.kind", "string", kind))
        if (status := span.get("status", {})).get("code") == _STATUS_ERROR:
            tags.append(_tag("error", "bool", True))
            if message := status.get("message"):
                tags.append(_tag("otel.status_description", "string", message))
        if scope:
            tags.append(_tag("otel.scope.name", "string", scope))
        if parent := span.get("parentSpanId"):
            self._parents[span["spanId"]] = parent
        self._spans[span["spanId"]] = {
            "traceID": self._id,
            "spanID": span["spanId"],
            "operationName": span.get("name", ""),
            "references": [
                _reference("FOLLOWS_FROM", link["traceId"], link["spanId"]) for link in span.get("links", ())
            ],
            "startTime": start_ns // 1000,
            "duration": max(0, end_ns - start_ns) // 1000,
            "tags": tags,
            "logs": [
                {
                    "timestamp": int(event["timeUnixNano"]) // 1000,
                    "fields": [
                        _tag("event", "string", event.get("name", "")),
                        *_tags(event.get("attributes", ())),
                    ],
                }
                for event in span.get("events", ())
            ],
            "processID": self._process(resource),
            "warnings": None,
            "flags": 1,
        }

    def document(self) -> dict[str, Any]:
        for span_id, parent in self._parents.items():
            span = self._spans[span_id]
            if parent in self._spans:
                span["references"].insert(0, _reference("CHILD_OF", self._id, parent))
            else:
                warning = f"parent span {parent} was not received"
                span["warnings"] = [warning]
                span["tags"].append(_tag("warning", "string", warning))
        spans = sorted(self._spans.values(), key=lambda span: (span["startTime"], -span["duration"]))
        return {
            "traceID": self._id,
            "spans": spans,
            "processes": dict(self._processes.values()),
            "warnings": None,
        }

    def _process(self, resource: list[dict[str, Any]]) -> str:
        key = json.dumps(resource, sort_keys=True)
        if key not in self._processes:
            names = [tag["value"] for tag in resource if tag["key"] == "service.name"]
            tags = [tag for tag in resource if tag["key"] != "service.name"]
            process = {"serviceName": names[0] if names else "unknown", "tags": tags}
            self._processes[key] = (f"p{len(self._processes) + 1}", process)
        return self._processes[key][0]


def _reference(kind: str, trace_id: str, span_id: str) -> dict[str, str]:
    return {"refType": kind, "traceID": trace_id, "spanID": span_id}


def _tag(key: str, kind: str, value: Any) -> dict[str, Any]:
    return {"key": key, "type": kind, "value": value}


def _tags(attributes: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [_tag(attribute["key"], *_value(attribute.get("value", {}))) for attribute in attributes]


def _value(value: dict[str, Any]) -> tuple[str, Any]:
    """Jaeger type and value of an OTLP AnyValue."""
    match value:
        case {"stringValue": text}:
            return "string", text
        case {"boolValue": flag}:
            return "bool", flag
        case {"intValue": number}:
            exact = abs(int(number)) <= _EXACT_IN_JAVASCRIPT
            return "int64", int(number) if exact else str(int(number))
        case {"doubleValue": number}:
            # JSON has no NaN and no infinity.
            return ("float64", number) if math.isfinite(number) else ("string", str(number))
        case {"arrayValue": _} | {"kvlistValue": _}:
            return "string", json.dumps(_plain(value))
        case {"bytesValue": data}:
            return "binary", data
        case _:
            return "string", ""


def _plain(value: dict[str, Any]) -> Any:
    """An OTLP AnyValue as JSON has it, lists and tables within each other included."""
    match value:
        case {"arrayValue": array}:
            return [_plain(item) for item in array.get("values", ())]
        case {"kvlistValue": table}:
            return {item["key"]: _plain(item.get("value", {})) for item in table.get("values", ())}
        case _:
            return _value(value)[1]
