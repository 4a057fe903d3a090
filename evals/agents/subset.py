"""Make a small valid trace out of a large one: the first requests, only the fields a loader needs."""

from __future__ import annotations

import json
import re
from pathlib import Path

from dualpath_sgl.evals.agents.trace import TraceSession, load_session
from dualpath_sgl.evals.common.errors import EvalError

NAME_CHARACTERS = 100


def write_subset(files: list[Path], out: Path, requests: int) -> list[Path]:
    """Write the first `requests` requests of each file to `out`, one file a session.

    Files are named after session ids, as far as these are fit for it, and never written over.  Raises
    EvalError when a file is no trace, or `out` cannot be written to or has such a file already.
    """
    sessions = [load_session(file) for file in files]
    targets = [out / f"{name}.json" for name in _names([session.id for session in sessions])]
    try:
        out.mkdir(parents=True, exist_ok=True)
        for session, target in zip(sessions, targets, strict=True):
            with target.open("x", encoding="utf-8") as file:
                file.write(json.dumps(_beginning(session, requests), separators=(",", ":")) + "\n")
    except FileExistsError as error:
        raise EvalError(f"{error.filename}: exists already; remove it, or name another --out") from None
    except OSError as error:
        problem = f"{error.filename}: cannot be written: {error.strerror}"
        raise EvalError(f"{problem}; name another --out") from None
    return targets


def _beginning(session: TraceSession, requests: int) -> dict[str, object]:
    return {
        "id": session.id,
        "block_size": session.block_size,
        "hash_id_scope": "local",
        "requests": [
            {"in": request.prompt_tokens, "out": request.output_tokens, "hash_ids": list(request.hash_ids)}
            for request in session.requests[:requests]
        ],
    }


def _names(ids: list[str]) -> list[str]:
    """A file name for each id, without its extension: no two alike, not even in other case."""
    names: list[str] = []
    taken: set[str] = set()
    for session_id in ids:
        fit = re.sub(r"[^A-Za-z0-9._-]+", "_", session_id)[:NAME_CHARACTERS].lstrip(".") or "session"
        name, number = fit, 1
        while name.lower() in taken:
            number += 1
            name = f"{fit}-{number}"
        taken.add(name.lower())
        names.append(name)
    return names
