"""What a run has measured so far, on disk after every measurement.

A run that was interrupted, or whose cluster broke, goes on from there: nothing measured is measured again.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

import dualpath_sgl
import scheduler_svc
from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.load.outcome.cells import Cell, Goodput, Record, Sample

FILE = "progress.json"
PACKAGES = tuple(Path(package.__path__[0]) for package in (dualpath_sgl, scheduler_svc))


class Progress(Record):
    settings: dict[str, Any]
    """Cluster file, repetitions and loads; a run with others is another one."""
    sources: list[str] = Field(default_factory=list)
    """Fingerprint of the sources of each process that took part, in order, each once."""
    expected: list[tuple[int, ...]] | None = None
    """Answers of the first cold run; every other one is compared with them."""
    cold_equal: bool = True
    """Whether the other clusters' cold runs answered the same."""
    cells: dict[str, Cell] = Field(default_factory=dict)
    goodput: Goodput | None = None
    store_capacity_bytes_per_s: float | None = None
    near_bits_per_s: int | None = None
    """Storage rate of the `near_bound` cells."""
    finished: bool = False

    def add(self, cell: Cell, sample: Sample) -> Cell:
        """`cell` says what was measured; returns the one that the sample now belongs to."""
        cell = self.cells.setdefault(cell.name, cell)
        cell.samples.append(sample)
        return cell

    def count(self, name: str) -> int:
        """Measurements of a cell so far."""
        return len(self.cells[name].samples) if name in self.cells else 0

    def save(self, folder: Path) -> None:
        """Whole or not at all."""
        beside = folder / f".{FILE}"
        with beside.open("w") as file:
            file.write(self.model_dump_json(indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        beside.replace(folder / FILE)


def is_finished(folder: Path) -> bool:
    """Whether a run ended there with everything measured.  Raises EvalError for a file that is none."""
    return (folder / FILE).exists() and _read(folder / FILE).finished


def begin(folder: Path, settings: dict[str, Any]) -> Progress:
    """Go on with the run in `folder`, or begin one there.  Raises EvalError if another one's is there."""
    if not folder.exists() or not any(folder.iterdir()):
        folder.mkdir(parents=True, exist_ok=True)
        progress = Progress(settings=settings)
    elif not (folder / FILE).exists():
        raise EvalError(f"out is {folder}, which holds other files; name another folder or remove it")
    else:
        progress = _read(folder / FILE)
        if progress.finished:
            raise EvalError(f"{folder} holds a finished run; name another folder (--out), or remove it")
        if progress.settings != settings:
            raise EvalError(
                f"{folder} holds an unfinished run with other settings: repeat it with those, name another "
                "folder (--out), or remove it"
            )
    if (sources := fingerprint()) not in progress.sources:
        progress.sources.append(sources)
    progress.save(folder)
    return progress


def fingerprint() -> str:
    """Of everything in the two packages that a measurement could depend on."""
    digest = hashlib.sha256()
    for root in PACKAGES:
        for file in sorted(sources(root)):
            digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def sources(root: Path) -> list[Path]:
    """Files of a package that say what runs."""
    # Not `rglob`: it does not follow the links to launch, evals and patches.
    return [
        Path(folder) / name
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if name.endswith((".py", ".patch", ".yaml"))
    ]


def _read(path: Path) -> Progress:
    try:
        return Progress.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{error.error_count()} fields are wrong"
        raise EvalError(f"{path}: {reason}; name another folder (--out), or remove this one") from None
