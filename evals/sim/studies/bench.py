"""Runs one experiment after another and tells of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from dualpath_sgl.evals.common.service_level import capacity
from dualpath_sgl.evals.sim.model.cluster import Outcome, Simulation
from dualpath_sgl.evals.sim.model.hardware import Hardware
from dualpath_sgl.evals.sim.model.models import Model
from dualpath_sgl.evals.sim.model.setup import MODES, Setup
from dualpath_sgl.evals.sim.model.workload import TRAJECTORIES, Trajectory, table2_trajectories, workload
from dualpath_sgl.evals.sim.studies.online import Verdict, serve

SEED = 1
FIRST_RATE_PER_S = 0.2
"""Agents a second at which the search for a capacity begins."""


class Nodes(NamedTuple):
    prefill: int
    decode: int

    def __str__(self) -> str:
        return f"{self.prefill}P{self.decode}D"

    def times(self, factor: int) -> Nodes:
        return Nodes(self.prefill * factor, self.decode * factor)


class Report(Protocol):
    def begin(self, name: str, turns: int | None) -> None:
        """An experiment of that many turns begins; None while unknown."""

    def made(self, turns: int) -> None:
        """More turns of it are done."""


Note = Callable[[str, str], None]
"""Takes name and value of something that has no counterpart among the paper's figures."""


class Bench:
    """The paper's set-up unless an experiment says otherwise."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._trajectories: dict[tuple[str, int], list[Trajectory]] = {}
        self._outcomes: dict[tuple, Outcome] = {}
        self._capacities: dict[tuple, float] = {}

    def trajectories(self, row: str, seed: int = SEED) -> list[Trajectory]:
        if (row, seed) not in self._trajectories:
            self._trajectories[row, seed] = table2_trajectories(row, seed)
        return self._trajectories[row, seed]

    def offline(
        self,
        model: Model,
        nodes: Nodes,
        agents: int,
        mode: str,
        *,
        row: str = "64k",
        label: str = "offline",
        hardware: Hardware | None = None,
        trajectories: Sequence[Trajectory] | None = None,
        scheduler: str = "policies",
    ) -> Outcome:
        """All agents at once, until the last is done.  What was asked before is not simulated again."""
        known = (model, nodes, agents, mode, row, hardware, scheduler)
        if trajectories is None and known in self._outcomes:
            return self._outcomes[known]
        hardware = hardware or Hardware()
        load = workload(trajectories or self.trajectories(row), agents, model, hardware, SEED)
        self._report.begin(f"{label}: {model.name} {nodes} {mode}, {agents:,} agents of {row}", load.turns)
        setup = Setup(model, hardware, *nodes, MODES[mode], scheduler, SEED)
        outcome = Simulation(setup, load, self._report.made).run_offline()
        if trajectories is None:
            self._outcomes[known] = outcome
        return outcome

    def speedup(self, model: Model, nodes: Nodes, agents: int, **settings) -> float:
        """JCT of Basic over DualPath; `settings` as of `offline`."""
        basic, dualpath = (
            self.offline(model, nodes, agents, mode, **settings) for mode in ("basic", "dualpath")
        )
        return basic.jct_s / dualpath.jct_s

    def capacity(self, model: Model, nodes: Nodes, mode: str, precision: float) -> float:
        """Agents a second that the service level bears; looked for once."""
        known = (model, nodes, mode, precision)
        if known not in self._capacities:
            self._capacities[known] = capacity(
                lambda rate_per_s: self.served(model, nodes, mode, rate_per_s).met,
                FIRST_RATE_PER_S,
                precision,
            )
        return self._capacities[known]

    def served(self, model: Model, nodes: Nodes, mode: str, rate_per_s: float) -> Verdict:
        """Agents that come at random, at that rate."""
        hardware = Hardware()
        load = workload(self.trajectories("64k"), TRAJECTORIES, model, hardware, SEED)
        setup = Setup(model, hardware, *nodes, MODES[mode], seed=SEED)
        self._report.begin(f"online: {model.name} {nodes} {mode}, {rate_per_s:.2f} agents/s", None)
        return serve(setup, load, rate_per_s, self._report.made)
