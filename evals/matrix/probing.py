"""A capacity search on a running deployment: one probe for each rate, each kept when it is done.

service level   mean TTFT and mean TPOT of a window at most what the experiment says (paper: 4 s, 50 ms)
stop rule       at the end of every window: level broken, or TTFT as it was some windows before
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

from dualpath_sgl.evals.agents.replay import Replay, RequestRecord
from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.common.service_level import Steadiness, capacity
from dualpath_sgl.evals.matrix.experiment import CapacityLoad, ServiceLevel
from dualpath_sgl.evals.matrix.results import Probe

BROKEN, STEADY, PLAYED_OUT = "service level broken", "steady", "all agents done"


class StopRule:
    """Sees a probe's requests end; `verdict` is the last window's."""

    def __init__(self, level: ServiceLevel) -> None:
        self._level = level
        self._steadiness = Steadiness(level.compared_windows, level.steady)
        self._window: list[RequestRecord] = []
        self._window_ends_s = level.window_s
        self._last: tuple[float, float] | None = None
        self.why = PLAYED_OUT

    def __call__(self, record: RequestRecord) -> bool:
        """Whether this request's end shows enough."""
        ended_s = record.started_s + record.e2e_s
        if ended_s < self._window_ends_s or not self._window:
            self._window.append(record)
            return False
        self._last = _means(self._window)
        while self._window_ends_s <= ended_s:
            self._window_ends_s += self._level.window_s
        self._window = [record]
        is_steady = self._steadiness.add(self._last[0])
        if not self._keeps(self._last):
            self.why = BROKEN
        elif is_steady:
            self.why = STEADY
        return self.why != PLAYED_OUT

    def verdict(self) -> tuple[bool, float, float]:
        """Whether the level was kept, mean TTFT and mean TPOT of the last window, seconds.

        A run that was played out in its first window is judged by that.
        """
        means = self._last or _means(self._window)
        return self._keeps(means), *means

    def _keeps(self, means: tuple[float, float]) -> bool:
        return means[0] <= self._level.ttft_s and means[1] <= self._level.tpot_s


def _means(records: list[RequestRecord]) -> tuple[float, float]:
    tpots_s = [record.tpot_s for record in records if record.tpot_s is not None]
    return fmean(record.ttft_s for record in records), fmean(tpots_s) if tpots_s else 0.0


def search(
    load: CapacityLoad,
    level: ServiceLevel,
    known: list[Probe],
    run: Callable[[float, StopRule], Replay],
    on_probe: Callable[[Probe], None],
) -> float:
    """The highest rate in agents per second that keeps the level.

    `known` are probes of an interrupted search, which are not run again; `run` plays agents at a rate
    until the rule says so; `on_probe` gets each new one.  Raises EvalError when `load.most_probes` were
    not enough.
    """
    probes = {probe.agents_per_s: probe for probe in known}

    def met(agents_per_s: float) -> bool:
        if agents_per_s not in probes:
            if len(probes) >= load.most_probes:
                tried = ", ".join(f"{rate:.3g} {'yes' if p.met else 'no'}" for rate, p in probes.items())
                raise EvalError(
                    f"no capacity found with {load.most_probes} probes (agents a second: {tried}); begin nearer "
                    "(first_agents_per_s), or give more most_probes or a coarser precision"
                )
            rule = StopRule(level)
            replay = run(agents_per_s, rule)
            kept, ttft_s, tpot_s = rule.verdict()
            probes[agents_per_s] = Probe(
                agents_per_s=agents_per_s,
                met=kept,
                why=rule.why,
                ttft_s=ttft_s,
                tpot_s=tpot_s,
                requests=len(replay.records),
                job_s=replay.job_s,
            )
            on_probe(probes[agents_per_s])
        return probes[agents_per_s].met

    return capacity(met, load.first_agents_per_s, load.precision)
