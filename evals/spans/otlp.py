"""Lines of OTLP JSON, as the collector writes them: what of them can be used.

A collector that was killed leaves half a line, and spans come from strangers too.  What is broken is
left out and said, never raised: spans are told about an evaluation, they are not its result.

Form: opentelemetry-proto, "OTLP/JSON": proto3 JSON, but ids in hex and enums as numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import orjson
from pydantic import BaseModel, Field, ValidationError, model_validator

from dualpath_sgl.evals.common.documents import first_problem
from dualpath_sgl.evals.common.errors import EvalError

Nanoseconds = Annotated[int, Field(ge=0, lt=2**64)]
"""Since 1970."""
Id = Annotated[str, Field(min_length=1)]


class _Message(BaseModel):
    """proto3 JSON: a null is a field that is not there; unknown fields are ignored."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None}


class _Value(_Message):
    stringValue: str | None = None
    boolValue: bool | None = None
    intValue: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    doubleValue: float | None = None
    arrayValue: _Values | None = None
    kvlistValue: _Attributes | None = None
    bytesValue: str | None = None


class _Values(_Message):
    values: list[_Value] = []


class _Attribute(_Message):
    key: str
    value: _Value = Field(default_factory=lambda: _Value())


class _Attributes(_Message):
    values: list[_Attribute] = []


class _Event(_Message):
    timeUnixNano: Nanoseconds
    name: str = ""
    attributes: list[_Attribute] = []


class _Link(_Message):
    traceId: Id
    spanId: Id


class _Status(_Message):
    code: int | str = 0
    message: str = ""


class _Span(_Message):
    traceId: Id
    spanId: Id
    parentSpanId: str = ""
    name: str = ""
    kind: int | str = 0
    startTimeUnixNano: Nanoseconds
    endTimeUnixNano: Nanoseconds
    attributes: list[_Attribute] = []
    events: list[_Event] = []
    links: list[_Link] = []
    status: _Status = _Status()


class _Resource(_Message):
    attributes: list[_Attribute] = []


class _Scope(_Message):
    name: str = ""


class _ScopeSpans(_Message):
    scope: _Scope = _Scope()
    spans: list[Any] = []
    """Judged one by one."""


class _ResourceSpans(_Message):
    resource: _Resource = _Resource()
    scopeSpans: list[_ScopeSpans] = []


class _Request(_Message):
    resourceSpans: list[_ResourceSpans] = []


def read_lines(spans_file: Path, skipped: list[str]) -> Iterator[dict[str, Any]]:
    """The export requests of a file, one a line, with those spans that are whole.

    What is left out is added to `skipped`: file, line, field, what is wrong.  Raises EvalError when the
    file cannot be read.
    """
    try:
        with spans_file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield from _request(line, f"{spans_file}: line {number}", skipped)
    except FileNotFoundError:
        raise EvalError(f"{spans_file}: no such file; did the cluster run with the collector?") from None
    except OSError as error:
        raise EvalError(f"{spans_file}: cannot be read: {error.strerror}; check the path") from None


def _request(line: bytes, where: str, skipped: list[str]) -> Iterator[dict[str, Any]]:
    try:
        request = _Request.model_validate(orjson.loads(line))
    except ValidationError as error:
        skipped.append(f"{where}: {first_problem(error)}")
        return
    except ValueError as error:
        skipped.append(f"{where}: not JSON ({error})")
        return
    for at_resource, resource in enumerate(request.resourceSpans):
        for at_scope, scope in enumerate(resource.scopeSpans):
            path = f"resourceSpans.{at_resource}.scopeSpans.{at_scope}.spans"
            scope.spans = list(_whole(scope.spans, path, where, skipped))
    yield request.model_dump(exclude_none=True)


def _whole(spans: list[Any], path: str, where: str, skipped: list[str]) -> Iterator[_Span]:
    for index, span in enumerate(spans):
        try:
            yield _Span.model_validate(span)
        except ValidationError as error:
            skipped.append(f"{where}: {first_problem(error, f'{path}.{index}')}")
