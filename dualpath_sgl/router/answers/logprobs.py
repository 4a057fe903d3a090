"""Log-probabilities of both engines, joined: the prompt's come from the PE, the answer's from the DE.

Sources: sglang/srt/managers/tokenizer_manager.py, convert_logprob_style, and entrypoints/openai/utils.py,
to_openai_style_logprobs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import orjson

from dualpath_sgl.router.answers.events import EVENT_END, objects_in

COMPLETIONS = "/v1/completions"
GENERATE = "/generate"
_WITHOUT_PROMPT = (None, -1)
"""Where log-probabilities begin unless a client says otherwise: with the answer."""
OF_IDS = "output_token_ids_logprobs"
"""Of ids that the client has named.  SGLang does not hand the first token's over."""


def of_the_prompt(path: str, body: Mapping[str, Any]) -> bool:
    """Whether an answer may hold any that only the PE has.  A stream begins later for their sake."""
    if path == COMPLETIONS:
        return bool(body.get("echo") and body.get("logprobs"))
    if path != GENERATE or not body.get("return_logprob"):
        return False
    begin = body.get("logprob_start_len")
    if body.get("stream") is not True:
        return True
    return bool(body.get("token_ids_logprob")) or any(
        one not in _WITHOUT_PROMPT for one in (begin if isinstance(begin, list) else [begin])
    )


def join(path: str, prefill: bytes, decode: bytes) -> bytes:
    """The DE's whole answer with what the PE's has besides."""
    answer = orjson.loads(decode)
    computed = {
        key: part for place, one in enumerate(objects_in(prefill)) for key, part in _parts(path, one, place)
    }
    for place, one in enumerate(answer if isinstance(answer, list) else [answer]):
        for key, generated in _parts(path, one, place):
            if key in computed:
                _JOIN[path](computed[key], generated)
    return orjson.dumps(answer)


class StreamJoiner:
    """The same for a stream: events in, events out, whatever the chunks they come in."""

    def __init__(self, path: str, prefill: bytes) -> None:
        """`prefill`: the PE's whole answer, a stream."""
        self._path = path
        self._computed: dict[int, dict[str, Any]] = {}
        for event in objects_in(prefill):
            for key, part in _parts(path, event):
                # Later events of SGLang's own form hold what came before; of OpenAI's, the first has the prompt.
                if path == GENERATE or key not in self._computed:
                    self._computed[key] = part
        self._rest = b""

    def feed(self, chunk: bytes) -> bytes:
        """The events that are complete now."""
        *events, self._rest = (self._rest + chunk).split(EVENT_END)
        return b"".join(self._joined(event) + EVENT_END for event in events)

    def _joined(self, event: bytes) -> bytes:
        if (generated := next(objects_in(event), None)) is None:
            return event
        for key, part in _parts(self._path, generated):
            if key in self._computed:
                _JOIN[self._path](self._computed[key], part)
                if self._path == COMPLETIONS:  # an event holds only what is new
                    del self._computed[key]
        return b"data: " + orjson.dumps(generated)


def _parts(path: str, one: Any, place: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """What can be joined in an answer or event, by its place among prompts and samples."""
    if path == GENERATE:
        yield one.get("index", place), one
    else:
        yield from ((choice.get("index", 0), choice) for choice in one.get("choices") or ())


def _join_meta(computed: dict[str, Any], generated: dict[str, Any]) -> None:
    before, after = computed.get("meta_info") or {}, generated.get("meta_info") or {}
    for name, of_prompt in before.items():
        if name.startswith("input_") and isinstance(of_prompt, list):
            after[name] = of_prompt + (after.get(name) or [])
    if after.get(OF_IDS) and before.get(OF_IDS):
        after[OF_IDS][0] = before[OF_IDS][0]


def _join_choice(computed: dict[str, Any], generated: dict[str, Any]) -> None:
    before, after = computed.get("logprobs") or {}, generated.get("logprobs") or {}
    for name, told in before.items():
        if isinstance(told, list):
            # The PE's last is the first token of the answer, which the DE tells, too.
            after[name] = told[:-1] + (after.get(name) or [])
    generated["logprobs"] = after


_JOIN: Mapping[str, Callable[[dict[str, Any], dict[str, Any]], None]] = {
    GENERATE: _join_meta,
    COMPLETIONS: _join_choice,
}
