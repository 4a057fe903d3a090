"""A client's request, as far as a router has to understand it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

import orjson

from dualpath_sgl.router import refusals
from dualpath_sgl.router.answers import logprobs
from dualpath_sgl.router.fleet.engines import Engine
from dualpath_sgl.router.fleet.errors import BadRequest
from scheduler_svc.wire.addresses import in_url
from scheduler_svc.wire.protocol import printable

SESSION_HEADERS = ("X-Session-Id", "X-SMG-Routing-Key")
"""The second is what the Rust router's sticky policies go by."""
MAX_SESSION_CHARACTERS = 256
BYTES_PER_TOKEN = 4
"""Roughly so in English text and code; prompts given as token ids are counted exactly."""
DP_RANKS = ("routed_dp_rank", "data_parallel_rank", "disagg_prefill_dp_rank")
"""Not the client's to say: prefill and decode engine would wait for each other at different ranks."""
MAX_DEPTH = 8
"""How deep a prompt's lists and objects are looked into: messages with parts and tool calls have fewer."""


class ClientRequest:
    """`path` is the engines' endpoint, such as `/generate`; `query` what stands behind its `?`."""

    def __init__(self, path: str, headers: Mapping[str, str], content: bytes, query: str = "") -> None:
        """Raises BadRequest."""
        try:
            body = orjson.loads(content)
        except orjson.JSONDecodeError as error:
            raise BadRequest(f"the body is not JSON: {error}") from None
        if not isinstance(body, dict):
            raise BadRequest(f"the body must be a JSON object, got {type(body).__name__}")
        refusals.check(path, body)
        for name in DP_RANKS:
            body.pop(name, None)
        self.path = path
        self.query = query
        self.headers = headers
        self._body: dict[str, Any] = body
        self.streams = body.get("stream") is True
        self.samples = refusals.samples(path, body)
        """Answers to each prompt."""
        self.wants_logprobs = logprobs.of_the_prompt(path, body)
        """They come from the PE and are merged into the DE's answer."""
        self.session_id = _session_id(headers, body)
        self.prompt_tokens = prompt_tokens(body)

    def body_for(self, prefill: Engine, room: int, ranks: Mapping[str, int] = MappingProxyType({})) -> bytes:
        """What an engine gets.  SGLang itself gives the members of a batch the rooms after `room`.

        `ranks`: SGLang's fields that name DP ranks, where the scheduler has chosen them.
        """
        host = urlsplit(prefill.url).hostname or ""
        return orjson.dumps(
            {
                **self._body,
                "bootstrap_host": in_url(host),
                "bootstrap_port": prefill.bootstrap_port,
                "bootstrap_room": room,
                **ranks,
            }
        )


def _session_id(headers: Mapping[str, str], body: Mapping[str, Any]) -> str | None:
    """The header, else SGLang's own fields `session_id` and `session_params.id`."""
    parameters = body.get("session_params")
    named = [headers.get(name) for name in SESSION_HEADERS]
    named += [body.get("session_id"), parameters.get("id") if isinstance(parameters, dict) else None]
    found = next((name for name in named if isinstance(name, str) and name), None)
    # Headers may hold bytes that are no UTF-8, and bodies line ends: the wire to the scheduler takes neither.
    return None if found is None else printable(found, MAX_SESSION_CHARACTERS)


def prompt_tokens(body: Mapping[str, Any]) -> int:
    """An estimate of the prompt's size; all prompts of a batch together."""
    for field in ("input_ids", "text", "prompt"):
        if (prompt := body.get(field)) is not None:
            return _size(prompt)
    tools = len(orjson.dumps(body["tools"])) // BYTES_PER_TOKEN if body.get("tools") else 0
    return tools + sum(_size(body.get(field)) for field in ("system", "messages", "instructions", "input"))


def _size(part: Any, depth: int = MAX_DEPTH) -> int:
    """Token ids count one each; texts by length, wherever they are in messages."""
    if depth == 0:
        return 0
    match part:
        case str():
            return len(part.encode()) // BYTES_PER_TOKEN
        case int():
            return 1
        case list() if part and isinstance(part[0], int):
            return len(part)
        case list():
            return sum(_size(inner, depth - 1) for inner in part)
        case {"content": content}:
            return _size(content, depth - 1) + _size(part.get("tool_calls"), depth - 1)
        case {"text": inner} | {"function": {"arguments": inner}} | {"output": inner}:
            return _size(inner, depth - 1)
    return 0
