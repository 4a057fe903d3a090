"""As much of a Dockerfile as these tests need: instructions in order, of every stage."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import NamedTuple


class Instruction(NamedTuple):
    name: str
    """In capitals."""
    value: str
    """Continued lines joined by a space."""

    @property
    def words(self) -> list[str]:
        """Without the options that stand first."""
        words = shlex.split(self.value)
        while words and words[0].startswith("--"):
            words.pop(0)
        return words


def read(file: Path) -> list[Instruction]:
    lines = [line for line in file.read_text().splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [Instruction(*line.split(None, 1)) for line in joined.splitlines()]


def after(instructions: list[Instruction], name: str) -> list[Instruction]:
    """Those behind the last instruction of that name."""
    last = max(index for index, instruction in enumerate(instructions) if instruction.name == name)
    return instructions[last + 1 :]
