"""Agent traces of full text in the form of LMCache's lmcache-agent-trace.

One line is one request: `{timestamp, input, output, session_id}`; `timestamp` in microseconds, `input`
the whole prompt's text, `output` the answer's.  Lines of several sessions, in any order, may share a file.
Fields not named here are ignored.

Source of the format: LMCache/lmcache-agent-trace.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError

from dualpath_sgl.evals.agents.chat import TextSession, TextTurn
from dualpath_sgl.evals.common.documents import first_problem, read_json_lines
from dualpath_sgl.evals.common.errors import EvalError


class TextRequest(BaseModel):
    model_config = ConfigDict(frozen=True)

    timestamp: Annotated[StrictInt, Field(ge=0)]
    """Microseconds."""
    input: Annotated[StrictStr, Field(min_length=1)]
    output: StrictStr
    session_id: Annotated[StrictStr, Field(max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
    """It goes into headers and logs: no control characters."""


def load_text_sessions(path: Path) -> list[TextSession]:
    """Read one file, or every `*.jsonl` of a directory in name order.  Raises EvalError."""
    if not path.exists():
        raise EvalError(f"{path}: no such file or directory; give a trace file or a directory of them")
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    found: dict[str, list[TextRequest]] = {}
    for file in files:
        for number, line in read_json_lines(file, "one lmcache-agent-trace request"):
            try:
                request = TextRequest.model_validate(line)
            except ValidationError as error:
                raise EvalError(f"{file}:{number}: {first_problem(error)}; correct or remove it") from None
            found.setdefault(request.session_id, []).append(request)
    if not found:
        raise EvalError(f"{path}: holds no request; give lmcache-agent-trace files (*.jsonl)")
    return [_session(name, requests) for name, requests in found.items()]


def _session(name: str, requests: list[TextRequest]) -> TextSession:
    requests = sorted(requests, key=lambda request: (request.timestamp, len(request.input)))
    first = requests[0]
    turns = [TextTurn(first.input, False, first.output, 0.0)]
    for before, request in pairwise(requests):
        continues = len(request.input) > len(before.input) and request.input.startswith(before.input)
        text = request.input.removeprefix(before.input) if continues else request.input
        think_s = (request.timestamp - before.timestamp) / 1e6
        turns.append(TextTurn(text, continues, request.output, think_s))
    return TextSession(name, tuple(turns))
