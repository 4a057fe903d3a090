"""Events of a stream, and JSON objects of any answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

EVENT_END = b"\n\n"
_STREAM = (b"data:", b"event:")
_DATA = b"data:"
DONE = b"[DONE]"


def objects_in(content: bytes) -> Iterator[dict[str, Any]]:
    """Every JSON object of a whole answer or of some events; a batch has several."""
    for document in _documents(content):
        if not document or document == DONE:
            continue
        try:
            found = orjson.loads(document)
        except orjson.JSONDecodeError:
            continue
        for part in found if isinstance(found, list) else [found]:
            if isinstance(part, dict):
                yield part


def _documents(content: bytes) -> Iterator[bytes]:
    if not content.startswith(_STREAM):
        yield content.strip()
        return
    for line in content.splitlines():
        if line.startswith(_DATA):
            yield line.removeprefix(_DATA).strip()
