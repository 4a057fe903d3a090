"""Agent traces in the claude-code-weka format: what was asked, in which order, sharing what.

One file is one session: `{id, block_size, requests: [{in, out, hash_ids}, ...]}`; `in` and
`out` are tokens, `hash_ids` has one id per whole block of `block_size` prompt tokens, and two
requests of the session share exactly the blocks at their start whose ids agree.  Ids mean
nothing outside their file.  Fields not named here are ignored.  A request of type `subagent`
holds requests of its own; they take its place in the order, and their ids say what they share.

Source of the format: callanjfox/kv-cache-tester (docs/trace_replay_tester.md).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError, model_validator

from evals.errors import EvalError

Tokens = Annotated[StrictInt, Field(ge=0, le=2**31)]


class TraceRequest(BaseModel):
    model_config = ConfigDict(frozen=True, populate_by_name=True)

    prompt_tokens: Annotated[StrictInt, Field(alias="in", ge=1, le=2**31)]
    output_tokens: Tokens = Field(alias="out")
    hash_ids: tuple[StrictInt, ...]


class TraceSession(BaseModel):
    model_config = ConfigDict(frozen=True)

    id: Annotated[StrictStr, Field(min_length=1, max_length=200)]
    block_size: Annotated[StrictInt, Field(ge=1, le=65536)]
    requests: Annotated[tuple[TraceRequest, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _one_id_per_whole_block(self) -> TraceSession:
        for index, request in enumerate(self.requests):
            whole_blocks = request.prompt_tokens // self.block_size
            if len(request.hash_ids) not in (whole_blocks, -(-request.prompt_tokens // self.block_size)):
                raise ValueError(
                    f"requests.{index}.hash_ids has {len(request.hash_ids)} ids, but in="
                    f"{request.prompt_tokens} tokens are {whole_blocks} whole blocks of {self.block_size}"
                )
        return self


class Sharing(NamedTuple):
    """What one request shares with an earlier one of its session."""

    parent: int
    """Index of the earlier request with the longest common prefix."""
    blocks: int
    extends: bool
    """The earlier prompt is contained completely and more follows: its answer was kept."""


def shared_blocks(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """Number of equal ids at the start of both."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if left[low:middle] == right[low:middle] else (low, middle - 1)
    return low


def sharings(session: TraceSession) -> list[Sharing | None]:
    """For every request, the earlier one it shares most with; None where it shares nothing.

    Among equals a prompt that is contained completely wins, then the latest.
    """
    found: list[Sharing | None] = []
    for index, request in enumerate(session.requests):
        best: tuple[int, bool, int] = (0, False, -1)
        for earlier, candidate in enumerate(session.requests[:index]):
            blocks = shared_blocks(request.hash_ids, candidate.hash_ids)
            extends = blocks == len(candidate.hash_ids) and request.prompt_tokens > candidate.prompt_tokens
            best = max(best, (blocks, extends, earlier))
        blocks, extends, parent = best
        found.append(Sharing(parent, blocks, extends) if blocks else None)
    return found


def theoretical_hit_rate(sessions: Sequence[TraceSession]) -> float:
    """Shared prompt tokens over all prompt tokens, whole blocks, infinite cache (0 to 1)."""
    hit_tokens = prompt_tokens = 0
    for session in sessions:
        for request, shared in zip(session.requests, sharings(session), strict=True):
            hit_tokens += shared.blocks * session.block_size if shared else 0
            prompt_tokens += request.prompt_tokens
    return hit_tokens / prompt_tokens


def load_session(file: Path) -> TraceSession:
    """Read one trace file.  Raises EvalError."""
    try:
        document = json.loads(file.read_bytes())
    except OSError as error:
        raise EvalError(f"{file}: cannot be read: {error.strerror}; check the path") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise EvalError(f"{file}: not JSON ({error}); expected one claude-code-weka session") from None
    if not isinstance(document, dict):
        raise EvalError(
            f"{file}: the top level is a {type(document).__name__}; expected an object with id, "
            "block_size and requests"
        )
    if isinstance(document.get("requests"), list):
        document = document | {"requests": list(_flat(document["requests"]))}
    try:
        return TraceSession.model_validate(document)
    except ValidationError as error:
        raise EvalError(f"{file}: {_first_problem(error)}") from None


def load_sessions(path: Path) -> list[TraceSession]:
    """Read one trace file, or every `*.json` of a directory in name order.  Raises EvalError."""
    if not path.exists():
        raise EvalError(f"{path}: no such file or directory; give a trace file or a directory of them")
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise EvalError(f"{path}: holds no .json file; give a directory of claude-code-weka sessions")
    return [load_session(file) for file in files]


def _flat(requests: list[Any]) -> Iterator[Any]:
    for request in requests:
        if isinstance(request, dict) and request.get("type") == "subagent":
            nested = request.get("requests")
            if isinstance(nested, list):
                yield from _flat(nested)
                continue
        yield request


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    if not field:
        return f"{first['msg']}; repair the file or leave it out"
    if first["type"] == "missing":
        return f"field {field} is missing; add it or leave the file out"
    got = str(first["input"])[:80]
    return f"field {field}: {first['msg']}, got {got!r}; correct the value or leave the file out"
