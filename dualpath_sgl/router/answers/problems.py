"""Errors inside engines' answers.

SGLang sends errors of a streamed request as events of an answer with status 200, and an abort as
a finish reason (sglang/srt/entrypoints/http_server.py, managers/tokenizer_manager.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from dualpath_sgl.router.answers.events import objects_in

CLIENT_ERROR = 400
SERVER_ERROR = 500


class Problem(NamedTuple):
    status: int
    message: str


def problem_in(content: bytes) -> Problem | None:
    """The first error in a whole answer, JSON or event stream; None for an answer without one."""
    for part in objects_in(content):
        # `response`: how /v1/responses ends a stream that failed.
        for told in (part, part.get("response")):
            if isinstance(told, dict) and (error := told.get("error")):
                return _problem(error if isinstance(error, dict) else {"message": error}, "code")
        meta = part.get("meta_info")
        reason = meta.get("finish_reason") if isinstance(meta, dict) else None
        if isinstance(reason, dict) and reason.get("type") == "abort":
            return _problem(reason, "status_code")
    return None


def _problem(error: dict[str, Any], status_field: str) -> Problem:
    status = error.get(status_field)
    if isinstance(status, int):
        return Problem(status, str(error.get("message")))
    # Anthropic's form has kinds instead of numbers.
    is_the_clients = error.get("type") == "invalid_request_error"
    return Problem(CLIENT_ERROR if is_the_clients else SERVER_ERROR, str(error.get("message")))
