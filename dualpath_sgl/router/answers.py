"""What has to be understood of engines' answers: errors inside them, and log-probabilities.

SGLang sends errors of a streamed request as events of an answer with status 200, and an abort as
a finish reason (sglang/srt/entrypoints/http_server.py, managers/tokenizer_manager.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import orjson

EVENT_END = b"\n\n"
EVENT_DATA = b"data:"
DONE = b"[DONE]"
SERVER_ERROR = 500


class Problem(NamedTuple):
    status: int
    message: str


def problem_in(content: bytes) -> Problem | None:
    """The first error in a whole answer, JSON or event stream; None for an answer without one."""
    for part in _objects(content):
        if error := part.get("error"):
            return _problem(error if isinstance(error, dict) else {"message": error}, "code")
        meta = part.get("meta_info")
        reason = meta.get("finish_reason") if isinstance(meta, dict) else None
        if isinstance(reason, dict) and reason.get("type") == "abort":
            return _problem(reason, "status_code")
    return None


def _problem(error: dict[str, Any], status_field: str) -> Problem:
    status = error.get(status_field)
    return Problem(status if isinstance(status, int) else SERVER_ERROR, str(error.get("message")))


def _objects(content: bytes) -> Iterator[dict[str, Any]]:
    """Every JSON object of an answer; a batch has several."""
    documents = (
        [event.removeprefix(EVENT_DATA) for event in content.split(EVENT_END)]
        if content.startswith(EVENT_DATA)
        else [content]
    )
    for document in documents:
        if not document.strip() or document.strip() == DONE:
            continue
        try:
            found = orjson.loads(document)
        except orjson.JSONDecodeError:
            continue
        for part in found if isinstance(found, list) else [found]:
            if isinstance(part, dict):
                yield part


def merge_logprobs(prefill: bytes, decode: bytes) -> bytes:
    """The DE's answer with the prompt's log-probabilities of the PE's before its own."""
    answer = orjson.loads(decode)
    both = zip(_objects(prefill), answer if isinstance(answer, list) else [answer], strict=False)
    for computed, generated in both:
        _prepend(computed, generated)
    return orjson.dumps(answer)


class LogprobMerger:
    """The same for a stream: events in, events out, whatever the chunks they come in."""

    def __init__(self, prefill: bytes) -> None:
        """`prefill`: the PE's whole answer, a stream of one event for each prompt of a batch."""
        self._computed = {part.get("index", 0): part for part in _objects(prefill)}
        self._rest = b""

    def feed(self, chunk: bytes) -> bytes:
        """The events that are complete now."""
        *events, self._rest = (self._rest + chunk).split(EVENT_END)
        return b"".join(self._merged(event) + EVENT_END for event in events)

    def _merged(self, event: bytes) -> bytes:
        if (generated := next(_objects(event), None)) is None:
            return event
        computed = self._computed.get(generated.get("index", 0), {})
        _prepend(computed, generated)
        return EVENT_DATA + b" " + orjson.dumps(generated)


def _prepend(computed: dict[str, Any], generated: dict[str, Any]) -> None:
    before = computed.get("meta_info", {}).get("input_token_logprobs")
    after = generated.get("meta_info", {}).get("input_token_logprobs")
    if before is not None and after is not None:
        generated["meta_info"]["input_token_logprobs"] = before + after
