"""Agent traces in the claude-code-weka format: what was asked, in which order, sharing what.

One file is one session: `{id, block_size, requests: [{in, out, hash_ids}, ...]}`; `in` and
`out` are tokens, `hash_ids` has one id per whole block of `block_size` prompt tokens, and two
requests of the session share exactly the blocks at their start whose ids agree.  Ids mean
nothing outside their file.  A request may have a `think_time` in seconds.  Fields not named here are
ignored.  A request of type `subagent`
holds requests of its own; they take its place in the order, and their ids say what they share.

Source of the format: callanjfox/kv-cache-tester (docs/trace_replay_tester.md).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError, model_validator

from dualpath_sgl.evals.common.documents import first_problem, read_json
from dualpath_sgl.evals.common.errors import EvalError

SHIPPED = Path(__file__).resolve().parent / "data"
"""Traces that come with this package."""

Tokens = Annotated[StrictInt, Field(ge=0, le=2**31)]


class TraceRequest(BaseModel):
    model_config = ConfigDict(frozen=True, populate_by_name=True)

    prompt_tokens: Annotated[StrictInt, Field(alias="in", ge=1, le=2**31)]
    output_tokens: Tokens = Field(alias="out")
    hash_ids: tuple[StrictInt, ...]
    think_s: Annotated[float | None, Field(alias="think_time", strict=True, allow_inf_nan=False)] = None
    """What the agent did before it asked (ran a tool, waited for a person), seconds; None: not said."""


class TraceSession(BaseModel):
    model_config = ConfigDict(frozen=True)

    id: Annotated[StrictStr, Field(max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
    """It goes into headers and logs: no control characters."""
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


class _Branch:
    """A place where earlier prompts part or end: a node of their prefix tree."""

    __slots__ = ("below", "ends", "ids", "latest")

    def __init__(self, ids: tuple[int, ...], latest: int) -> None:
        self.ids = ids
        """From the branch above to this one."""
        self.below: dict[int, _Branch] = {}
        """By their first id."""
        self.latest = latest
        """The latest prompt that came through here."""
        self.ends: dict[int, int] = {}
        """Prompts that end here: tokens -> the latest of that length."""

    def split(self, blocks: int) -> _Branch:
        """A branch after the first `blocks` of the ids that lead here, with this one below it."""
        upper = _Branch(self.ids[:blocks], self.latest)
        self.ids = self.ids[blocks:]
        upper.below[self.ids[0]] = self
        return upper


def sharings(session: TraceSession) -> list[Sharing | None]:
    """For every request, the earlier one it shares most with; None where it shares nothing.

    Among equals a prompt that is contained completely wins, then the latest.
    """
    root = _Branch((), -1)
    return [_enter(root, index, request) for index, request in enumerate(session.requests)]


def _enter(root: _Branch, index: int, request: TraceRequest) -> Sharing | None:
    """Add a prompt to the tree of the earlier ones; what it shares with them."""
    ids, branch, blocks = request.hash_ids, root, 0
    while True:
        earlier, branch.latest = branch.latest, index
        below = branch.below.get(ids[blocks]) if blocks < len(ids) else None
        if below is None:
            break
        equal = shared_blocks(below.ids, ids[blocks : blocks + len(below.ids)])
        if equal < len(below.ids):
            branch.below[ids[blocks]] = below = below.split(equal)
        branch, blocks = below, blocks + equal
    contained = [latest for tokens, latest in branch.ends.items() if tokens < request.prompt_tokens]
    if blocks < len(ids):
        rest = branch.below[ids[blocks]] = _Branch(ids[blocks:], index)
        rest.ends[request.prompt_tokens] = index
    else:
        branch.ends[request.prompt_tokens] = index
    return Sharing(max(contained, default=earlier), blocks, bool(contained)) if blocks else None


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
    document = read_json(file, "one claude-code-weka session")
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
        raise EvalError(f"{file}: {first_problem(error)}; correct it or leave the file out") from None


def load_sessions(path: Path) -> list[TraceSession]:
    """Read one trace file, or every `*.json` of a directory in name order.  Raises EvalError."""
    if not os.path.exists(path):
        raise EvalError(f"{path}: no such file or directory; give a trace file or a directory of them")
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise EvalError(f"{path}: holds no .json file; give a directory of claude-code-weka sessions")
    return [load_session(file) for file in files]


def _flat(requests: list[Any]) -> Iterator[Any]:
    """The requests with those of sub-agents in their places, however deep."""
    open_lists = [iter(requests)]
    while open_lists:
        request = next(open_lists[-1], _END)
        if request is _END:
            open_lists.pop()
        elif (nested := _nested(request)) is not None:
            open_lists.append(iter(nested))
        else:
            yield request


_END = object()


def _nested(request: object) -> list[Any] | None:
    """The requests of a sub-agent; None for anything else."""
    if not isinstance(request, dict) or request.get("type") != "subagent":
        return None
    nested = request.get("requests")
    return nested if isinstance(nested, list) else None
