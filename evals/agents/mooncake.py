"""Request traces in the form of Mooncake's FAST25 release, as sessions.

One line is one request: `{timestamp, input_length, output_length, hash_ids}`; `timestamp` in milliseconds,
lengths in tokens, one id for each block of 512 prompt tokens, ids alike in the whole file.  There are no
sessions in it.  Requests that begin with the same block may share more and are put into one, in the order
of the file; a session's own branches stay what they are.  Time between two of them is think time.

Source of the format: kvcache-ai/Mooncake, FAST25-release.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, model_validator

from dualpath_sgl.evals.agents.trace import Tokens, TraceRequest, TraceSession
from dualpath_sgl.evals.common.documents import first_problem, read_json_lines
from dualpath_sgl.evals.common.errors import EvalError

BLOCK_SIZE_TOKENS = 512


class MooncakeRequest(BaseModel):
    model_config = ConfigDict(frozen=True)

    timestamp: Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
    """Milliseconds."""
    input_length: Annotated[StrictInt, Field(ge=1, le=2**31)]
    output_length: Tokens
    hash_ids: tuple[StrictInt, ...]

    @model_validator(mode="after")
    def _one_id_per_block(self) -> MooncakeRequest:
        whole = self.input_length // BLOCK_SIZE_TOKENS
        if len(self.hash_ids) not in (whole, -(-self.input_length // BLOCK_SIZE_TOKENS)):
            raise ValueError(
                f"hash_ids has {len(self.hash_ids)} ids, but input_length={self.input_length} tokens are "
                f"{whole} whole blocks of {BLOCK_SIZE_TOKENS}"
            )
        return self


def load_mooncake(path: Path) -> list[TraceSession]:
    """Read one file.  Sessions with most requests come first.  Raises EvalError."""
    if path.is_dir():
        raise EvalError(f"{path}: is a directory; name one FAST25 file (*.jsonl) in it")
    groups: dict[object, list[MooncakeRequest]] = {}
    for number, line in read_json_lines(path, "one FAST25 request"):
        try:
            request = MooncakeRequest.model_validate(line)
        except ValidationError as error:
            raise EvalError(f"{path}:{number}: {first_problem(error)}; correct or remove it") from None
        first = request.hash_ids[0] if request.hash_ids else ("short", number)
        groups.setdefault(first, []).append(request)
    if not groups:
        raise EvalError(f"{path}: holds no request; give a FAST25 file of Mooncake (*.jsonl)")
    ordered = sorted(groups.values(), key=len, reverse=True)
    return [_session(f"mooncake-{index:04d}", requests) for index, requests in enumerate(ordered)]


def _session(name: str, requests: list[MooncakeRequest]) -> TraceSession:
    before_ms = requests[0].timestamp
    turns = []
    for request in requests:
        turns.append(
            TraceRequest(
                prompt_tokens=request.input_length,
                output_tokens=request.output_length,
                hash_ids=request.hash_ids,
                think_s=max(0.0, request.timestamp - before_ms) / 1000,
            )
        )
        before_ms = request.timestamp
    return TraceSession(id=name, block_size=BLOCK_SIZE_TOKENS, requests=tuple(turns))
