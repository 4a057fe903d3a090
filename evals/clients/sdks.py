"""OpenAI's and Anthropic's Python packages, each in a program of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dualpath_sgl.evals.clients.outcome import ClientFailed, Outcome, run_client


def sdk(program: str, topics: Sequence[str], python: str, url: str, folder: Path) -> Outcome:
    """`program`: a module of this folder, and what it is to ask; `python`: one that has the package."""
    argv = [python, str(Path(__file__).with_name(f"{program}.py")), url, *topics]
    try:
        answers: dict[str, str] = json.loads(run_client(argv, folder, f"{program}.log"))
    except ClientFailed as failed:
        return Outcome(0, {}, str(failed))
    return Outcome(len(answers), answers)
