"""Make a small valid trace out of a large one: the first requests, only the fields a loader needs."""

from __future__ import annotations

import json
from pathlib import Path

from evals.trace import load_session


def write_subset(files: list[Path], out: Path, requests: int) -> list[Path]:
    """Write the first `requests` requests of each file to `out`, one file a session.

    Raises EvalError when a file is no trace.
    """
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for file in files:
        session = load_session(file)
        document = {
            "id": session.id,
            "block_size": session.block_size,
            "hash_id_scope": "local",
            "requests": [
                {
                    "in": request.prompt_tokens,
                    "out": request.output_tokens,
                    "hash_ids": list(request.hash_ids),
                }
                for request in session.requests[:requests]
            ],
        }
        target = out / f"{session.id}.json"
        target.write_text(json.dumps(document, separators=(",", ":")) + "\n")
        written.append(target)
    return written
