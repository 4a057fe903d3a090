"""The packages that were tested together, per profile: the files of `requirements/`, which this package has too."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path

import dualpath_sgl

FOLDER = Path(dualpath_sgl.__file__).parent / "requirements"


class Profile(StrEnum):
    CPU = "cpu"
    CUDA = "cuda"


def files(profile: Profile) -> list[Path]:
    names = ("torch-cpu.txt", "cpu.txt") if profile is Profile.CPU else ("cuda.txt",)
    return [FOLDER / name for name in names]


def pins(profile: Profile) -> dict[str, str]:
    """Package -> version, without a local part such as `+cpu`."""
    text = "".join(file.read_text(encoding="utf-8") for file in files(profile))
    return dict(re.findall(r"^([\w.-]+)==([^\s+]+)", text, re.MULTILINE))
