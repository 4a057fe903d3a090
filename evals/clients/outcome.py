"""What one client says of one run."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ENDS_WITHIN_S = 240.0
SHOWN_CHARACTERS = 400


class Outcome(NamedTuple):
    requests: int
    """How many it sent."""
    answers: Mapping[str, str]
    """What was answered, under names that are the same in every run; empty where a client does not tell."""
    problem: str = ""
    """Why it did not go well."""

    @property
    def ok(self) -> bool:
        return not self.problem


class ClientFailed(Exception):
    """The message is the end of what the client said."""


def run_client(argv: Sequence[str], folder: Path, log: str) -> str:
    """Its standard output.  Raises ClientFailed.  `folder`: where it runs and where its log stays."""
    with (folder / log).open("w") as errors:
        try:
            ended = subprocess.run(
                argv,
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                timeout=ENDS_WITHIN_S,
                env=os.environ | {"no_proxy": "*", "NO_COLOR": "1"},
            )
        except subprocess.TimeoutExpired:
            raise ClientFailed(f"does not end within {ENDS_WITHIN_S:g} s") from None
    if ended.returncode:
        said = (folder / log).read_text() + ended.stdout
        raise ClientFailed(f"exit status {ended.returncode}: {said.strip()[-SHOWN_CHARACTERS:]}")
    return ended.stdout
