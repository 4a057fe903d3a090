"""JSON files that others wrote: read whole, or refused with file, problem and remedy."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
from pydantic import ValidationError

from dualpath_sgl.evals.common.errors import EvalError

SHOWN_CHARACTERS = 80


def read_json(file: Path, expected: str) -> Any:
    """The document in `file`; `expected` says what it should be.  Raises EvalError."""
    try:
        # Stricter than json.loads: no NaN, no half characters, no bottomless nesting.
        return orjson.loads(file.read_bytes())
    except OSError as error:
        raise EvalError(f"{file}: cannot be read: {error.strerror}; expected {expected}") from None
    except ValueError as error:
        raise EvalError(f"{file}: not JSON ({error}); expected {expected}") from None


def read_json_lines(file: Path, expected: str) -> Iterator[tuple[int, Any]]:
    """(line number, document) of each line that is not empty; `expected` says what a line should be.

    Raises EvalError.
    """
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise EvalError(f"{file}: cannot be read: {error.strerror}; expected {expected} a line") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, orjson.loads(line)
        except ValueError as error:
            raise EvalError(f"{file}:{number}: not JSON ({error}); expected {expected}") from None


def first_problem(error: ValidationError, within: str = "") -> str:
    """The first wrong field and what it holds; `within` is the path to what was validated."""
    first = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(str(part) for part in (*([within] if within else []), *first["loc"]))
    if first["type"] == "missing":
        return f"field {field} is missing"
    message = first["msg"].removeprefix("Value error, ")
    if not field:
        return message
    return f"field {field}: {message}, got {_shown(first['input'])!r}"


def _shown(value: Any) -> str:
    # Containers may be huge or deep.
    text = reprlib.repr(value) if isinstance(value, (dict, list)) else str(value)
    return text[:SHOWN_CHARACTERS]
