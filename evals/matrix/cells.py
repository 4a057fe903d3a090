"""The cells of an experiment, in the order in which they are run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import NamedTuple

from dualpath_sgl.evals.matrix.experiment import Experiment, Load, Topology, TraceVariant, variants
from dualpath_sgl.evals.matrix.workloads import seed_of
from dualpath_sgl.launch.config.cluster import ClusterConfig

FORMAT = 1
"""Part of every fingerprint: raise it when a cell is measured in another way."""


class Cell(NamedTuple):
    topology: str
    mode: str
    trace: TraceVariant
    load: Load
    repetition: int
    """From 0."""

    @property
    def name(self) -> str:
        """Of its file, too."""
        again = f"--{self.repetition + 1}" if self.repetition else ""
        return f"{self.topology}--{self.mode}--{self.trace.name}--{self.load.name}{again}"

    @property
    def traffic_name(self) -> str:
        """Of what is sent, which all modes and topologies have in common."""
        again = f"--{self.repetition + 1}" if self.repetition else ""
        return f"{self.trace.name}--{self.load.name}{again}"

    def seed(self, experiment: Experiment) -> int:
        """All modes and topologies get the same tokens; other traces, loads and repetitions get others."""
        return seed_of(experiment.seed, self.traffic_name)


def cells(experiment: Experiment) -> Iterator[Cell]:
    """Those of one cluster follow each other."""
    for topology in experiment.topologies:
        for mode in experiment.modes:
            for repetition in range(experiment.repetitions):
                for trace in variants(experiment):
                    for load in experiment.loads:
                        yield Cell(topology, mode, trace, load, repetition)


def counts(cell: Cell) -> Topology:
    return Topology.of(cell.topology)


def fingerprint(cell: Cell, experiment: Experiment, config: ClusterConfig, url: str | None) -> str:
    """Of everything that the cell's result depends on; `url` of a deployment that ran already."""
    trace = cell.trace
    depends_on = {
        "format": FORMAT,
        "cluster": config.model_dump(mode="json"),
        "mode": cell.mode,
        "topology": cell.topology,
        "trace": trace.choice.model_dump(mode="json", exclude={"append", "generation"}),
        "stretch": [trace.append, trace.generation],
        "load": cell.load.model_dump(mode="json"),
        "service_level": experiment.service_level.model_dump() if cell.load.kind == "capacity" else None,
        "seed": cell.seed(experiment),
        "check_tokens": experiment.check_tokens,
        "url": url,
    }
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]
