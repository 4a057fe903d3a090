"""Agents that come at random: the highest rate that keeps the service level (paper, section 7, online).

service level   mean TTFT <= 4 s and mean TPOT <= 50 ms
stop rule       every 150 s: TTFT above 4 s, or within 5 % of what it was 30 minutes before
"""

from __future__ import annotations

import gc
import random
from statistics import fmean
from typing import NamedTuple

from dualpath_sgl.evals.common.service_level import Steadiness
from dualpath_sgl.evals.sim.model.cluster import Progress, Simulation, TurnTimes
from dualpath_sgl.evals.sim.model.setup import Setup
from dualpath_sgl.evals.sim.model.workload import Workload

TTFT_LIMIT_S = 4.0
TPOT_LIMIT_S = 0.050
WINDOW_S = 150.0
COMPARED_WINDOWS = 12
"""30 minutes."""
STEADY = 0.05
LONGEST_S = 4 * 3600.0
"""A run that is never steady ends here; it has kept the service level all that time."""


class Verdict(NamedTuple):
    met: bool
    ttft_s: float
    """Means of the last window."""
    tpot_s: float


def serve(setup: Setup, workload: Workload, agents_per_s: float, progress: Progress) -> Verdict:
    """Poisson arrivals of agents, each with a trajectory drawn from `workload`, until the stop rule."""
    return _Run(setup, workload, agents_per_s, progress).verdict()


class _Run:
    def __init__(self, setup: Setup, workload: Workload, agents_per_s: float, progress: Progress) -> None:
        self._rng = random.Random(f"arrivals/{setup.seed}")
        self._agents = len(workload.agents)
        self._agents_per_s = agents_per_s
        self._simulation = Simulation(setup, workload, progress)
        self._simulation.on_turn = self._turn
        self._ttfts_s: list[float] = []
        self._tpots_s: list[float] = []
        self._steadiness = Steadiness(COMPARED_WINDOWS, STEADY)
        self._verdict = Verdict(True, 0.0, 0.0)
        loop = self._simulation.loop
        loop.at(0.0, self._arrival)
        loop.at(WINDOW_S, self._window)

    def verdict(self) -> Verdict:
        gc.disable()
        try:
            self._simulation.loop.run()
        finally:
            gc.enable()
        return self._verdict

    def _arrival(self, _) -> None:
        self._simulation.start(self._rng.randrange(self._agents))
        loop = self._simulation.loop
        loop.at(loop.now_s + self._rng.expovariate(self._agents_per_s), self._arrival)

    def _turn(self, times: TurnTimes) -> None:
        self._ttfts_s.append(times.ttft_s)
        if times.tpot_s:
            self._tpots_s.append(times.tpot_s)

    def _window(self, _) -> None:
        loop = self._simulation.loop
        ttft_s = fmean(self._ttfts_s) if self._ttfts_s else 0.0
        tpot_s = fmean(self._tpots_s) if self._tpots_s else 0.0
        self._ttfts_s.clear()
        self._tpots_s.clear()
        is_steady = self._steadiness.add(ttft_s)
        is_met = ttft_s <= TTFT_LIMIT_S and tpot_s <= TPOT_LIMIT_S
        self._verdict = Verdict(is_met, ttft_s, tpot_s)
        if not is_met or is_steady or loop.now_s >= LONGEST_S:
            self._simulation.stop()
        else:
            loop.at(loop.now_s + WINDOW_S, self._window)
