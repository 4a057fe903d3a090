"""What an answer tells its client, without what differs from run to run.

Two servers give the same answer when both give the same status and tell the same.  A stream tells what its
events do together: where one event ends and the next begins is a matter of time.
"""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from dualpath_sgl.evals.clients.cases import CHAT, COMPLETIONS, GENERATE, MESSAGES, RESPONSES, Case

ANSWERED_WITHIN_S = 60.0
CLOSE = 2e-3
"""Log-probabilities that were computed in other batches differ a little."""
VARYING = {
    *("id", "created", "created_at", "completed_at", "rid", "weight_version", "bootstrap_room", "request_id"),
    *("cached_tokens", "cached_tokens_details", "prompt_tokens_details", "input_tokens_details", "dp_rank"),
    *("total_retractions", "model", "item_id", "call_id", "sglext", "metadata", "num_retractions"),
    *("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens", "reasoning_tokens"),
}
"""`input_tokens` of Anthropic's form are those that were not cached."""
TIMES = ("latency", "_wait", "_time", "_ts", "duration", "throughput")


class Told(NamedTuple):
    status: int
    what: Any
    """The JSON answered, comparable; the text where it is no JSON."""


def ask(url: str, case: Case, timeout_s: float = ANSWERED_WITHIN_S) -> Told:
    """Raises OSError when nothing is answered in time."""
    headers = {"Content-Type": "application/json"}
    # The only path on which SGLang minds the name.
    body = case.body | ({"model": served_model(url)} if case.path == RESPONSES else {})
    request = urllib.request.Request(url + case.path, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return Told(answer.status, _told(case.path, answer.read().decode(errors="replace")))
    except urllib.error.HTTPError as error:
        return Told(error.code, _told(case.path, error.read().decode(errors="replace")))


@cache
def served_model(url: str) -> str:
    """What the server at `url` calls its model; raises OSError."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=ANSWERED_WITHIN_S) as answer:
        return json.load(answer)["data"][0]["id"]


def differences(right: Any, other: Any, where: str = "") -> Iterator[str]:
    """Sentences; none when both tell the same."""
    match right, other:
        case (dict(), dict()):
            for name in sorted(right.keys() | other.keys()):
                yield from differences(right.get(name), other.get(name), f"{where}.{name}")
        case (list(), list()) if len(right) == len(other):
            for index, (one, two) in enumerate(zip(right, other, strict=True)):
                yield from differences(one, two, f"{where}[{index}]")
        case (float(), float() | int()) | (int(), float()) if math.isclose(right, other, abs_tol=CLOSE):
            pass
        case _ if right != other:
            yield f"{where}: {right!r:.150} is {other!r:.150}"


def problem_told(told: Told) -> str | None:
    """What an error says, in whatever form; None for an answer without one."""
    if (problem := _problem_in(told.what)) is not None:
        return problem
    return str(told.what) if told.status >= 400 else None


def _problem_in(part: Any) -> str | None:
    match part:
        case {"error": {"message": str(message)}} | {"error": str(message)}:
            return message
        case {"finish_reason": {"type": "abort", "message": message}}:
            return str(message)
        case dict() | list():
            inner = part.values() if isinstance(part, dict) else part
            return next((said for one in inner if (said := _problem_in(one)) is not None), None)
    return None


def _told(path: str, content: str) -> Any:
    if content.startswith(("data:", "event:")):
        return _JOINED[path](list(_events(content)))
    try:
        return _comparable(json.loads(content))
    except json.JSONDecodeError:
        return content


def _events(content: str) -> Iterator[Any]:
    for event in content.split("\n\n"):
        for line in event.split("\n"):  # JSON may hold other line ends
            if line.startswith("data:") and (data := line.removeprefix("data:").strip()) != "[DONE]":
                yield _event(data)


def _event(data: str) -> dict[str, Any]:
    try:
        return json.loads(data)
    except json.JSONDecodeError:  # the Rust router's errors
        return {"error": {"message": data}}


def _comparable(part: Any) -> Any:
    if isinstance(part, list):
        return [_comparable(inner) for inner in part]
    if isinstance(part, dict):
        return {
            name: _comparable(inner)
            for name, inner in part.items()
            if name not in VARYING and not any(mark in name for mark in TIMES)
        }
    return part


def _generated(events: list[Any]) -> Any:
    """Every event holds what came before it."""
    return {str(event.get("index", 0)): _comparable(event) for event in events}


def _chosen(events: list[Any]) -> Any:
    """Chat and text completions: deltas by choice."""
    told: dict[str, Any] = {}
    for event in events:
        if event.get("error"):
            told["error"] = _comparable(event["error"])
        if event.get("usage"):
            told["usage"] = _comparable(event["usage"])
        for choice in event.get("choices", ()):
            joined = told.setdefault(f"choice {choice['index']}", {})
            _join(joined, _comparable({name: part for name, part in choice.items() if name != "index"}))
    return told


def _join(joined: dict[str, Any], delta: dict[str, Any]) -> None:
    for name, part in delta.items():
        if isinstance(part, dict):
            if not isinstance(joined.get(name), dict):
                joined[name] = {}
            _join(joined[name], part)
        elif isinstance(part, list) and isinstance(joined.get(name), list):
            joined[name] = joined[name] + part
        elif (
            isinstance(part, str)
            and isinstance(joined.get(name), str)
            and name not in ("role", "type", "name")
        ):
            joined[name] += part
        elif part is not None or name not in joined:
            joined[name] = part


def _message(events: list[Any]) -> Any:
    """Anthropic's: blocks that begin, grow and end."""
    told: dict[str, Any] = {"blocks": {}}
    for event in events:
        match event:
            case {"type": "content_block_start", "index": index, "content_block": block}:
                told["blocks"][index] = _comparable(block)
            case {"type": "content_block_delta", "index": index, "delta": delta}:
                _join(told["blocks"][index], _comparable(delta))
            case {"type": "message_delta" | "error"}:
                _join(told, _comparable(event))
            case {"type": name}:
                told.setdefault("events", []).append(name)
    return told


def _response(events: list[Any]) -> Any:
    """The last event holds everything."""
    return _comparable({name: part for name, part in events[-1].items() if name != "sequence_number"})


_JOINED = {
    GENERATE: _generated,
    COMPLETIONS: _chosen,
    CHAT: _chosen,
    MESSAGES: _message,
    RESPONSES: _response,
}
