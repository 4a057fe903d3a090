"""The experiment file: modes x topologies x traces x loads, as one YAML file says them.

Every problem is told with the file, the field, what it holds and the remedy.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dualpath_sgl.evals.agents.table2 import ROWS
from dualpath_sgl.evals.agents.trace import SHIPPED
from dualpath_sgl.evals.common.documents import first_problem
from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.matrix.modes import MODES
from dualpath_sgl.launch.config import CLUSTERS
from dualpath_sgl.launch.config.yaml_file import YamlProblem, read

EXPERIMENTS = Path(__file__).resolve().parent / "experiments"
"""Experiment files that come with this package."""
NAME = r"^[a-z0-9][a-z0-9-]*$"
_MOST_ENGINES = 64


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Topology(NamedTuple):
    """Engines of each role."""

    prefill: int
    decode: int

    @classmethod
    def of(cls, name: str) -> Topology:
        """`1p2d`: one prefill engine, two decode engines.  Raises ValueError."""
        found = re.fullmatch(r"([1-9][0-9]?)p([1-9][0-9]?)d", name)
        counts = cls(int(found[1]), int(found[2])) if found else cls(0, 0)
        if not 1 <= counts.prefill <= _MOST_ENGINES or not 1 <= counts.decode <= _MOST_ENGINES:
            raise ValueError(f"topology {name!r}: write 1p2d for one prefill engine and two decode engines")
        return counts


Factor = Annotated[float, Field(gt=0, le=100)]


class TraceChoice(_Section):
    """Sessions, how much of them, and how long they may get."""

    format: Literal["claude-code-weka", "lmcache-agent", "mooncake-fast25", "table2"] = "claude-code-weka"
    """`lmcache-agent` is full text through the chat template; `table2` is drawn from the paper's means."""
    path: Path | None = None
    """File or folder, relative to the experiment file; null: the sessions that come with this package
    (claude-code-weka only)."""
    row: Literal["32k", "48k", "64k"] = "32k"
    """Of the paper's Table 2."""
    turns: Annotated[int, Field(ge=1)] | None = None
    """First requests of each session; null: all."""
    max_context: Annotated[int, Field(ge=64, le=1 << 21)] = 4096
    """Longest prompt with its answer after scaling, in tokens."""
    append: tuple[Factor, ...] = (1.0,)
    """Sweep: times what each turn appends.  One cell each."""
    generation: tuple[Factor, ...] = (1.0,)
    """Sweep: times what each turn generates.  One cell each."""

    @model_validator(mode="after")
    def _has_a_source(self) -> TraceChoice:
        if self.path is None and self.format in ("lmcache-agent", "mooncake-fast25"):
            raise ValueError(f"path is missing: format {self.format} needs a file or a folder")
        if self.path is not None and self.format == "table2":
            raise ValueError("path is given, but table2 is drawn, not read: remove it")
        if self.format == "table2" and self.row not in ROWS:
            raise ValueError(f"row is {self.row!r}; choose from {', '.join(ROWS)}")
        return self


class _Load(_Section):
    agents: Annotated[int, Field(ge=1, le=1_000_000)]
    """Live sessions; above the number of recorded ones these are used again."""
    think: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Times the trace's think times; 0: the next turn follows at once."""
    longest_think_s: Annotated[float, Field(ge=0)] = 60.0
    """No agent thinks longer."""


class OfflineLoad(_Load):
    """All agents live from the start; a fixed number of requests is in flight."""

    kind: Literal["offline"]
    concurrency: Annotated[int, Field(ge=1, le=100_000)]

    @property
    def name(self) -> str:
        return f"{self.agents}-agents-{self.concurrency}-at-once{_thinking(self)}"


class OnlineLoad(_Load):
    """Agents come at random (Poisson)."""

    kind: Literal["online"]
    agents_per_s: Annotated[float, Field(gt=0, le=10_000)]

    @property
    def name(self) -> str:
        return f"{self.agents}-agents-{self.agents_per_s:g}-per-s{_thinking(self)}"


class CapacityLoad(_Load):
    """The highest rate of arriving agents that keeps the service level, by doubling and bisection."""

    kind: Literal["capacity"]
    first_agents_per_s: Annotated[float, Field(gt=0, le=10_000)]
    """Where the search begins."""
    precision: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Relative."""
    most_probes: Annotated[int, Field(ge=2, le=100)] = 12
    """A search that has not ended by then failed."""

    @property
    def name(self) -> str:
        return f"capacity-{self.agents}-agents{_thinking(self)}"


def _thinking(load: _Load) -> str:
    return f"-think-{load.think:g}" if load.think else ""


Load = OfflineLoad | OnlineLoad | CapacityLoad


class ServiceLevel(_Section):
    """The paper's (section 7, online), and its stop rule."""

    ttft_s: Annotated[float, Field(gt=0)] = 4.0
    """Mean time to first token, at most."""
    tpot_s: Annotated[float, Field(gt=0)] = 0.05
    """Mean time per output token, at most."""
    window_s: Annotated[float, Field(gt=0)] = 150.0
    """A probe of the capacity search looks at the requests that ended in this time."""
    compared_windows: Annotated[int, Field(ge=1)] = 12
    """It ends when the mean TTFT is as it was so many windows before (30 minutes)."""
    steady: Annotated[float, Field(gt=0, le=1)] = 0.05
    """As it was: within this part of it."""


class Experiment(_Section):
    name: str = Field(pattern=NAME, max_length=64)
    """Lower case letters, digits and dashes: the report's title and its folder."""
    about: str = ""
    """One sentence for the report."""
    cluster: Path
    """Cluster description, relative to this file, or the name of one that comes with this package; its
    mode and counts are replaced by the experiment's."""
    modes: Annotated[tuple[str, ...], Field(min_length=1)]
    """`basic` first: others are compared with the first one."""
    topologies: Annotated[tuple[str, ...], Field(min_length=1)] = ("1p1d",)
    traces: Annotated[dict[Annotated[str, Field(pattern=NAME)], TraceChoice], Field(min_length=1)]
    loads: Annotated[tuple[Annotated[Load, Field(discriminator="kind")], ...], Field(min_length=1)]
    service_level: ServiceLevel = ServiceLevel()
    repetitions: Annotated[int, Field(ge=1, le=100)] = 1
    """Of every cell, each with tokens of its own."""
    seed: int = 1
    """Of the random tokens, the synthetic sessions and the arrivals."""
    check_tokens: bool = True
    """Compare every answer with a single server's, which is run first (not in a capacity search)."""
    sample_s: Annotated[float, Field(ge=0.1, le=60)] = 1.0
    """Between two looks at the links' counters and the scheduler's."""

    @field_validator("modes")
    @classmethod
    def _are_modes(cls, modes: tuple[str, ...]) -> tuple[str, ...]:
        for mode in modes:
            if mode not in MODES:
                raise ValueError(f"mode {mode!r}: choose from {', '.join(MODES)}")
        return _once(modes)

    @field_validator("topologies")
    @classmethod
    def _are_topologies(cls, topologies: tuple[str, ...]) -> tuple[str, ...]:
        for topology in topologies:
            Topology.of(topology)
        return _once(topologies)

    @model_validator(mode="after")
    def _loads_differ(self) -> Experiment:
        _once(tuple(load.name for load in self.loads))
        return self


def _once(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name!r} is given twice: keep one of them")
    return names


def load_experiment(file: Path) -> Experiment:
    """Read an experiment; its paths come out absolute.  Raises EvalError."""
    try:
        content = read(file)
    except OSError as error:
        shipped = ", ".join(str(known) for known in sorted(EXPERIMENTS.glob("*.yaml")))
        raise EvalError(f"{file}: {error.strerror}; shipped examples: {shipped}") from None
    except YamlProblem as error:
        raise EvalError(f"{file}: {error}") from None
    if not isinstance(content, dict):
        raise EvalError(f"{file}: must be a mapping of fields, got {type(content).__name__}")
    try:
        experiment = Experiment.model_validate(content)
    except ValidationError as error:
        raise EvalError(f"{file}: {first_problem(error)}; correct it") from None
    traces = {name: _located(trace, file.parent) for name, trace in experiment.traces.items()}
    cluster = _first_existing(file.parent / experiment.cluster, CLUSTERS / experiment.cluster)
    if cluster is None:
        raise EvalError(
            f"{file}: field cluster: no such file {str(experiment.cluster)!r}, neither beside the experiment "
            f"nor in {CLUSTERS}"
        )
    return experiment.model_copy(update={"traces": traces, "cluster": cluster})


def _first_existing(*files: Path) -> Path | None:
    return next((file.resolve() for file in files if file.is_file()), None)


def _located(trace: TraceChoice, folder: Path) -> TraceChoice:
    if trace.path is None:
        shipped = SHIPPED / "claude-code-weka" if trace.format == "claude-code-weka" else None
        return trace.model_copy(update={"path": shipped})
    return trace.model_copy(update={"path": (folder / trace.path).resolve()})


class TraceVariant(NamedTuple):
    """A trace, stretched for a sweep."""

    name: str
    choice: TraceChoice
    append: float
    generation: float


def variants(experiment: Experiment) -> Iterator[TraceVariant]:
    """The traces of an experiment: each as it is, or one for each step of its sweeps."""
    for name, choice in experiment.traces.items():
        for append in choice.append:
            for generation in choice.generation:
                changes = (("append", append, choice.append), ("generation", generation, choice.generation))
                marks = [f"-{what}-{value:g}" for what, value, steps in changes if len(steps) > 1]
                yield TraceVariant(name + "".join(marks), choice, append, generation)
