"""Seconds, rates and sweeps beside the paper's own: ratios alone hide a common factor.

Paper values are read off its figures by eye, but for TTFT and TPOT, which it prints.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

from dualpath_sgl.evals.sim.model.hardware import Hardware
from dualpath_sgl.evals.sim.model.models import DS_27B, DS_660B, Model
from dualpath_sgl.evals.sim.model.workload import Trajectory, with_appends, workload
from dualpath_sgl.evals.sim.studies.bench import SEED, Bench, Nodes

UNIT = Nodes(2, 4)
"""The paper's 660B cluster."""
JCT_S: dict[int, dict[str, float]] = {
    512: {"basic": 2900, "dualpath": 2100, "oracle": 2000},
    1024: {"basic": 5400, "layerwise": 4250, "dual-path": 3200, "dualpath": 3000},
    2048: {"basic": 10_100, "layerwise": 8750, "dual-path": 6500, "dualpath": 5450},
    4096: {"basic": 19_500, "dualpath": 10_400, "oracle": 9400},
}
"""660B, 64K, by agents and mode."""
AGENTS_PER_S = {
    (DS_27B, Nodes(1, 1)): {"basic": 0.3, "dualpath": 0.5},
    (DS_660B, UNIT): {"basic": 0.2, "dualpath": 0.45},
}
"""Online capacity."""
SERVED_PER_S, TTFT_S, TPOT_S = 0.4, 1.739, 0.039
"""660B, DualPath, at that rate of agents."""
APPENDS = (0.5, 1.0, 2.0, 4.0)
APPEND_SPEEDUPS = (1.82, 1.99)
"""Least and most of the paper's sweep of append lengths: 660B, 64K, 1,024 agents."""
APPEND_AGENTS = 1024
HIT, GB_PER_PFLOP = 0.987, 22.0
"""Of the 64K row, at its mean append and context."""


class Absolute(NamedTuple):
    name: str
    paper: str
    simulated: float

    @property
    def factor(self) -> float | None:
        """simulated / paper; None where the paper gives a range."""
        try:
            return self.simulated / float(self.paper)
        except ValueError:
            return None


def job_completion(bench: Bench, agents: Sequence[int]) -> list[Absolute]:
    return [
        Absolute(
            f"JCT of 660B 2P4D, {count:,} agents, {mode}, s",
            f"{paper_s:.0f}",
            bench.offline(DS_660B, UNIT, count, mode).jct_s,
        )
        for count in agents
        for mode, paper_s in JCT_S[count].items()
    ]


def online(bench: Bench, precision: float) -> list[Absolute]:
    found = [
        Absolute(
            f"online capacity of {model.name} {nodes}, {mode}, agents/s",
            f"{paper}",
            bench.capacity(model, nodes, mode, precision),
        )
        for (model, nodes), rates in AGENTS_PER_S.items()
        for mode, paper in rates.items()
    ]
    served = bench.served(DS_660B, UNIT, "dualpath", SERVED_PER_S)
    name = f"of 660B 2P4D, dualpath, {SERVED_PER_S} agents/s, s"
    return [
        *found,
        Absolute(f"TTFT {name}", f"{TTFT_S}", served.ttft_s),
        Absolute(f"TPOT {name}", f"{TPOT_S}", served.tpot_s),
    ]


def append_sweep(bench: Bench, agents: int) -> list[Absolute]:
    """Appends of the drawn trajectories times a factor, cut at the row's greatest length."""
    drawn = bench.trajectories("64k")
    paper = "-".join(map(str, APPEND_SPEEDUPS))
    return [
        Absolute(
            f"Basic/DualPath, 660B 2P4D, {agents:,} agents, appends x {factor:g}",
            paper,
            bench.speedup(
                DS_660B, UNIT, agents, label="appends", trajectories=with_appends(drawn, factor, 64 * 1024)
            ),
        )
        for factor in APPENDS
    ]


def drawn(bench: Bench) -> list[Absolute]:
    """What the drawn turns of the 64K row are like: Table 2 gives means of sessions' means."""
    sessions = bench.trajectories("64k")
    turns = [turn for session in sessions for turn in session]
    appends = [
        later.prompt - sooner.prompt - sooner.output
        for session in sessions
        for sooner, later in pairwise(session)
    ]
    return [
        Absolute("tokens appended in a turn, mean of all turns", "429", fmean(appends)),
        Absolute(
            "tokens generated in a turn, mean of all turns", "176", fmean(turn.output for turn in turns)
        ),
        Absolute(
            "hits of all prompt tokens",
            f"{HIT}",
            sum(turn.hit for turn in turns) / sum(turn.prompt for turn in turns),
        ),
        Absolute("GB of stored KV a PFLOP, 660B", f"{GB_PER_PFLOP:g}", _gb_per_pflop(sessions, DS_660B)),
    ]


def _gb_per_pflop(sessions: Sequence[Trajectory], model: Model) -> float:
    hardware = Hardware()
    load = workload(sessions, len(sessions), model, hardware, SEED)
    turns = [turn for agent in load.agents for turn in agent]
    flop = sum(turn.attention_s + turn.experts_s for turn in turns) * hardware.prefill_flop_per_s
    return load.hit_bytes / 1e9 / (flop / 1e15)
