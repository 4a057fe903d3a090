"""The environment of clients whose pins clash with SGLang's (requirements/clients.txt)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from dualpath_sgl.evals.common.errors import EvalError

REQUIREMENTS = Path(__file__).parents[2] / "requirements" / "clients.txt"
FOLDER = Path(".cache") / "clients"
MADE = "requirements.txt"
"""What an environment was made from; written when it is whole."""


def clients_environment(folder: Path = FOLDER) -> Path:
    """The folder of its programs; made anew (a minute) unless it is there and whole.  Raises EvalError."""
    wanted = REQUIREMENTS.read_text()
    made = folder / MADE
    programs = folder.absolute() / "bin"
    if made.exists() and made.read_text() == wanted:
        return programs
    pip = [str(programs / "python"), "-m", "pip", "install", "-q", "--no-deps", "--require-hashes"]
    for argv in ([sys.executable, "-m", "venv", "--clear", str(folder)], [*pip, "-r", str(REQUIREMENTS)]):
        ended = subprocess.run(argv, capture_output=True, text=True)
        if ended.returncode:
            raise EvalError(
                f"{folder}: cannot be made: {ended.stderr.strip()[-300:]}; if this machine cannot reach "
                f"a package index, install {REQUIREMENTS} elsewhere and name its environment with --clients"
            )
    made.write_text(wanted)
    return programs
