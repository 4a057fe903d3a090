"""An error in the form that the client of a path reads: OpenAI's and SGLang's, or Anthropic's.

Sources: sglang/srt/entrypoints/openai/serving_base.py and entrypoints/anthropic/serving.py.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import orjson

from dualpath_sgl.router.fleet.errors import RouteError

ANTHROPIC = "/v1/messages"
_ANTHROPIC_TYPES = {
    HTTPStatus.BAD_REQUEST: "invalid_request_error",
    HTTPStatus.METHOD_NOT_ALLOWED: "invalid_request_error",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "request_too_large",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    HTTPStatus.SERVICE_UNAVAILABLE: "overloaded_error",
}


def error_body(error: RouteError, path: str) -> bytes:
    """JSON."""
    return orjson.dumps(_fields(error, path))


def error_events(error: RouteError, path: str) -> bytes:
    """The same as the last events of a stream that has begun."""
    data = b"data: " + error_body(error, path) + b"\n\n"
    return b"event: error\n" + data if path == ANTHROPIC else data + b"data: [DONE]\n\n"


def _fields(error: RouteError, path: str) -> dict[str, Any]:
    if path == ANTHROPIC:
        kind = _ANTHROPIC_TYPES.get(error.status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": str(error)}}
    return {"error": {"message": str(error), "type": error.kind, "code": int(error.status)}}
