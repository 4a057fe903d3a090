"""The requests of cases.py, sent as curl would send them: one client for each path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dualpath_sgl.evals.clients.cases import CHAT, COMPLETIONS, GENERATE, MESSAGES, RESPONSES, generating
from dualpath_sgl.evals.clients.outcome import Outcome
from dualpath_sgl.evals.clients.told import Told, ask, problem_told

PATHS = (GENERATE, COMPLETIONS, CHAT, MESSAGES, RESPONSES)
SAID = ("text", "content", "arguments", "partial_json", "output_ids", "token_ids")
"""Under these names stand what a model has said."""


def curl(path: str, url: str, folder: Path) -> Outcome:
    """What was told stands in the folder."""
    cases = [case for case in generating() if case.path == path]
    answers: dict[str, str] = {}
    unanswered = []
    for case in cases:
        try:
            told = ask(url, case)
        except OSError as error:
            unanswered.append(f"{case.name}: {error}")
            continue
        if told.status in (404, 405) or told.status >= 500:
            unanswered.append(f"{case.name}: {told.status}")
        else:
            answers[case.name] = _comparable(told)
    (folder / "answers.json").write_text(json.dumps(answers, indent=1))
    problem = f"{len(unanswered)} of {len(cases)}: {unanswered[0]}" if unanswered else ""
    return Outcome(len(cases), answers, problem)


def _comparable(told: Told) -> str:
    return "an error" if problem_told(told) is not None else repr(list(_said(told.what)))


def _said(part: Any) -> list[Any]:
    match part:
        case dict():
            return [
                one
                for name, inner in sorted(part.items())
                for one in ([inner] if name in SAID and _is_plain(inner) else _said(inner))
            ]
        case list():
            return [one for inner in part for one in _said(inner)]
    return []


def _is_plain(part: Any) -> bool:
    """A text, or token ids: no parts that say something themselves."""
    return isinstance(part, str) or (isinstance(part, list) and all(isinstance(one, int) for one in part))
