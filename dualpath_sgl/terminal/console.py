"""Where output goes: a terminal as wide as it is, a pipe at a fixed width."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper

from rich.console import Console

PIPED_WIDTH = 120
"""Columns where nothing says how wide: neither a terminal nor COLUMNS."""

errors = Console(stderr=True, highlight=False, soft_wrap=True)
"""What a person has to put right."""


def output() -> Console:
    """Of stdout.  A pipe gets no colours; its lines are as wide as COLUMNS says, else PIPED_WIDTH."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # A character that a pipe's encoding lacks is no error.
    known = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()
    return Console(highlight=False, width=None if known else PIPED_WIDTH)
