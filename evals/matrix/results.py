"""What a cell found: one JSON file each, written when the cell is done.

`fingerprint` is of everything the cell depends on, so a file is used again only while that is the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dualpath_sgl.evals.common.documents import first_problem, read_json
from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.compare.summary import EngineRead, Mismatch

CELLS = "cells"
REFERENCES = "references"
FAILURES = "failures.json"
EXPERIMENT = "experiment.yaml"
"""The file as it was given."""
EXPERIMENT_READ = "experiment.json"
"""What it means, with its defaults."""
ENVIRONMENT = "environment.json"

Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Request(Record):
    """One request, times in seconds."""

    session: str
    turn: Count
    prompt_tokens: Count
    output_tokens: Count
    cached_tokens: Count
    theoretical_hit_tokens: Count
    started_s: Seconds
    """Since the cell's replay began."""
    ttft_s: Seconds
    ttst_s: Seconds | None
    tpot_s: Seconds | None
    e2e_s: Seconds
    trace_id: str


class Samples(Record):
    """Counters of a running deployment, looked at now and then; all lists are as long as `at_s`."""

    at_s: list[float]
    """Since the replay began."""
    link_bytes: dict[str, list[int]]
    """Engine -> bytes that its storage link has brought, headers included; empty where links are not shaped."""
    read_bytes: dict[str, list[int]]
    """Engine -> bytes that it has read from the store, as the scheduler or the engine counts."""
    forwarded_bytes: dict[str, list[int]]
    """Engine -> bytes that it has taken out of another engine's memory."""
    paths: dict[str, list[int]]
    """Load path -> requests planned so; empty without a scheduler."""


class Probe(Record):
    """One rate of a capacity search."""

    agents_per_s: float
    met: bool
    why: str
    """What ended it."""
    ttft_s: Seconds
    """Mean over the last window."""
    tpot_s: Seconds
    requests: Count
    job_s: Seconds


class Traffic(Record):
    """What was sent."""

    source: str
    format: str
    sessions: Count
    requests: Count
    scale_factor: float
    """Replayed length per length in the trace."""
    longest_tokens: Count
    raw_hit_rate: float | None
    """Theoretical, of the trace as it is: whole blocks, infinite cache; None: a text says nothing of blocks."""
    hit_rate: float | None
    """Theoretical, of what is replayed: whole pages, infinite cache; None: known only afterwards."""
    new_tokens: Count
    """Prompt and generated tokens, each counted once: what an infinite cache would hold."""
    seed: int


class CellResult(Record):
    """One mode on one topology under one load of one trace."""

    name: str
    fingerprint: str
    mode: str
    cluster_mode: str
    policy: str | None
    """The scheduler's path policy; None where no scheduler decides."""
    topology: str
    trace: str
    append: float
    generation: float
    load: str
    kind: str
    concurrency: int | None
    """Of an offline load."""
    agents_per_s: float | None
    """Of an online load; of a capacity search, what it found."""
    repetition: Count
    finished_at: str
    """ISO 8601, UTC."""
    traffic: Traffic
    tokens_equal: bool | None
    """To a single server's; None: not compared."""
    mismatches: list[Mismatch]
    job_s: Seconds
    """Job completion time (JCT)."""
    storage_limit_s: Seconds | None
    """What the storage links alone need for the bytes that were read, spread evenly over the engines that may
    read; None where no rate is known, and of a capacity search."""
    link_bits_per_s: int | None
    """Of one engine's storage link."""
    requests: list[Request]
    """Of a capacity search: of the last probe that kept the level; counters are of all probes."""
    engines: dict[str, EngineRead]
    fallbacks: dict[str, Count]
    duplicate_store_pages: Count | None
    samples: Samples
    probes: list[Probe]
    """Of a capacity search."""

    @property
    def paths(self) -> dict[str, int]:
        """Requests planned on each load path."""
        return {path: counts[-1] - counts[0] for path, counts in self.samples.paths.items() if counts}

    @property
    def hit_rate(self) -> float:
        """Prompt tokens that were not computed, over all."""
        return _share(self.requests, "cached_tokens")

    @property
    def theoretical_hit_rate(self) -> float:
        return _share(self.requests, "theoretical_hit_tokens")

    @property
    def read_bytes(self) -> dict[str, int]:
        """Engine -> bytes read from the store."""
        return {name: engine.store_read_bytes for name, engine in self.engines.items()}


def _share(requests: list[Request], field: str) -> float:
    prompts = sum(request.prompt_tokens for request in requests)
    return sum(getattr(request, field) for request in requests) / prompts if prompts else 0.0


class Failure(Record):
    cell: str
    problem: str


class Failures(Record):
    """Cells that were tried and did not finish; they are tried again the next time."""

    failures: list[Failure] = []


def write(document: BaseModel, file: Path) -> None:
    """In one step: a reader sees the old file or the new one, an interrupted writer leaves the old."""
    file.parent.mkdir(parents=True, exist_ok=True)
    staged = file.with_name(f".{file.name}")
    staged.write_text(document.model_dump_json(indent=1) + "\n", encoding="utf-8")
    os.replace(staged, file)


def read_cell(file: Path) -> CellResult:
    """Raises EvalError."""
    document = read_json(file, "the result of one cell")
    try:
        return CellResult.model_validate(document)
    except ValidationError as error:
        raise EvalError(
            f"{file}: {first_problem(error)}; it was written by another version: remove it, and the cell is "
            "measured again"
        ) from None


def finished_cells(out: Path) -> Iterator[CellResult]:
    """The cells that `out` holds, in name order.  Raises EvalError."""
    for file in sorted((out / CELLS).glob("*.json")):
        yield read_cell(file)
