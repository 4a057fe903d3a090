"""The packages that were tested together, per profile: the files of `requirements/`, which this package has too."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path

import dualpath_sgl

FOLDER = Path(dualpath_sgl.__file__).parent / "requirements"
CPU, TORCH_CPU, CUDA = (FOLDER / f"{name}.txt" for name in ("cpu", "torch-cpu", "cuda"))


class Profile(StrEnum):
    """What engines compute on."""

    CPU = "cpu"
    CUDA = "cuda"


def pins(profile: Profile) -> dict[str, str]:
    """Package -> version, without a local part such as `+cpu`."""
    files = (CPU, TORCH_CPU) if profile is Profile.CPU else (CUDA,)
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    return dict(re.findall(r"^([\w.-]+)==([^\s+]+)", text, re.MULTILINE))
