"""`POST /place`: a pair of engines over HTTP, for gateways that do not speak ZeroMQ.

    {"prompt_tokens": 4000, "session_id": "s1"}  ->  200 {"request_id", "room", "prefill": {...}, "decode": {...}}

The fields are those of `scheduler_svc.wire.protocol.Place` and `Placement`.  Both engines get the room as
`bootstrap_room`, and the prefill engine's `url` and `bootstrap_port` as bootstrap host and port.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from http import HTTPStatus
from typing import NamedTuple

from scheduler_svc.wire.protocol import (
    PROTOCOL_VERSION,
    Error,
    ErrorCode,
    Malformed,
    Place,
    Placement,
    decode_request,
    encode,
)

PLACE_PATH = "/place"
MOST_BYTES = 16 * 1024
"""Of a body."""
RETRY_AFTER_S = 1
"""Engines that left may be back by then, and a busy scheduler idle."""

_STATUS = {
    ErrorCode.NO_ENGINE: HTTPStatus.SERVICE_UNAVAILABLE,
    ErrorCode.BUSY: HTTPStatus.SERVICE_UNAVAILABLE,
}
"""Any other error is the asker's."""


class Answer(NamedTuple):
    status: HTTPStatus
    body: bytes


def answer(body: bytes, place: Callable[[Place], Placement | Error]) -> Answer:
    """`place` may wait; it raises TimeoutError when the scheduler's loop does not answer."""
    try:
        asked = _read(body)
    except ValueError as error:
        return failed(HTTPStatus.BAD_REQUEST, str(error))
    try:
        placed = place(asked)
    except TimeoutError:
        return failed(HTTPStatus.SERVICE_UNAVAILABLE, "the scheduler's loop does not answer")
    if isinstance(placed, Error):
        return failed(_STATUS.get(placed.code, HTTPStatus.BAD_REQUEST), f"{placed.code}: {placed.message}")
    return Answer(HTTPStatus.OK, encode(placed))


def _read(body: bytes) -> Place:
    """Raises ValueError that names the field, the value and the remedy."""
    if len(body) > MOST_BYTES:
        raise ValueError(f"body: {len(body)} bytes; at most {MOST_BYTES} are read")
    try:
        fields = json.loads(body)
    except ValueError as error:
        raise ValueError(f"body: {error}; give a JSON object") from None
    if not isinstance(fields, dict):
        raise ValueError(f"body: got {body[:120]!r}; give a JSON object")
    named = {"request_id": uuid.uuid4().hex, "version": PROTOCOL_VERSION, "oldest_version": PROTOCOL_VERSION}
    try:
        place = decode_request(json.dumps({**named, **fields, "type": "place"}).encode())
    except Malformed as error:
        raise ValueError(str(error)) from None
    assert isinstance(place, Place), "its type says so"
    return place


def failed(status: HTTPStatus, message: str) -> Answer:
    """`message`: for people."""
    return Answer(status, json.dumps({"error": message}).encode())
