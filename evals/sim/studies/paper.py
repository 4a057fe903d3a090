"""The paper's results beside the same figures from the model (paper, section 7).

What the paper leaves open about its set-ups was chosen so:
* 660B offline and ablation: 64K trajectories, 1,024 and 2,048 agents, the counts of its ablation,
  and 4,096 for the best speed-up;
* 27B: no count of agents is published; 1,024, and all three rows of Table 2;
* SNIC Max/Avg: bytes of the whole run, because no interval is published;
* equally many storage links: 64K and 2,048 agents, where storage is the bottleneck.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from dualpath_sgl.evals.sim.model.cluster import Outcome
from dualpath_sgl.evals.sim.model.hardware import Hardware
from dualpath_sgl.evals.sim.model.models import DS_27B, DS_660B
from dualpath_sgl.evals.sim.studies.bench import Bench, Nodes, Note
from dualpath_sgl.evals.sim.studies.figures import PAIR, Figure

UNIT = Nodes(2, 4)
"""The paper's 660B cluster."""
SWEEP = (Nodes(1, 1), Nodes(2, 1), Nodes(1, 2))
ABLATION = ("basic", "layerwise", "dual-path", "dualpath")


class Size(NamedTuple):
    """How much is simulated."""

    ablation_agents: tuple[int, ...]
    most_agents: int
    sweep_agents: int
    rows: tuple[str, ...]
    pair_agents: int
    units: int
    """In the large cluster; the paper's 24 make 48P96D."""
    unit_agents: int
    rate_precision: float | None
    """Relative, of an online capacity; None: leave the online experiments out."""
    sensitivity_agents: int | None
    """None: leave the sensitivities out."""


FULL = Size((1024, 2048), 4096, 1024, ("32k", "48k", "64k"), 2048, 24, 2000, 0.06, 512)
QUICK = Size((256,), 512, 256, ("64k",), 256, 4, 128, None, None)
"""For development: so few agents do not keep storage busy."""


@dataclass(frozen=True)
class ScaleRun:
    """What simulating the large cluster took."""

    gpus: int
    agents: int
    turns: int
    cpu_s: float


def offline_660b(bench: Bench, size: Size, note: Note) -> list[Figure]:
    runs = {
        agents: {mode: bench.offline(DS_660B, UNIT, agents, mode) for mode in (*ABLATION, "split", "oracle")}
        for agents in size.ablation_agents
    }
    most = {mode: bench.offline(DS_660B, UNIT, size.most_agents, mode) for mode in ("basic", "dualpath")}
    for agents, found in (*runs.items(), (size.most_agents, most)):
        for mode, outcome in found.items():
            note(f"660B {UNIT}, {agents:,} agents, {mode}", _describe(outcome, found["basic"]))

    # The paper gives means over both counts of what is left of Basic's time.
    left = {
        mode: fmean(found[mode].jct_s / found["basic"].jct_s for found in runs.values()) for mode in ABLATION
    }
    imbalance = {
        mode: fmean(found[mode].storage_max_over_mean_total for found in runs.values())
        for mode in ("dual-path", "dualpath")
    }
    return [
        Figure.of("offline_speedup_660b", 1.87, max(map(_speedup, (*runs.values(), most)))),
        Figure.of("ablation_layerwise_over_basic", 1 / (1 - 0.1721), 1 / left["layerwise"]),
        Figure.of("ablation_dual_path_over_layerwise", 1.34, left["layerwise"] / left["dual-path"]),
        Figure.of("ablation_scheduling_over_layerwise", 1.52, left["layerwise"] / left["dualpath"]),
        Figure.of("snic_max_over_mean_round_robin", 1.53, imbalance["dual-path"]),
        Figure.of("snic_max_over_mean_scheduling", 1.18, imbalance["dualpath"]),
    ]


def sweep_27b(bench: Bench, size: Size, note: Note) -> list[Figure]:
    speedups: dict[tuple[Nodes, str], float] = {}
    for nodes in SWEEP:
        for row in size.rows:
            found = {
                mode: bench.offline(DS_27B, nodes, size.sweep_agents, mode, row=row)
                for mode in ("basic", "dualpath")
            }
            speedups[nodes, row] = _speedup(found)
            for mode, outcome in found.items():
                name = f"27B {nodes} {row}, {size.sweep_agents:,} agents, {mode}"
                note(name, _describe(outcome, found["basic"]))
    return [
        Figure.of("offline_speedup_27b_1p1d", 1.78, max(speedups[SWEEP[0], row] for row in size.rows)),
        Figure.of("pd_sweep_27b_mean", 1.64, fmean(speedups.values())),
        Figure.of("pd_sweep_27b_max", 2.46, max(speedups.values())),
    ]


def pairs_27b(bench: Bench, size: Size, note: Note) -> list[Figure]:
    runs: dict[tuple[str, str], Outcome] = {}
    for nodes in SWEEP:
        for mode in ("basic", "dualpath"):
            runs[str(nodes), mode] = bench.offline(DS_27B, nodes, size.pair_agents, mode)
        for mode in ("basic", "dualpath"):
            note(
                f"27B {nodes} 64k, {size.pair_agents:,} agents, {mode}",
                _describe(runs[str(nodes), mode], runs[str(nodes), "basic"]),
            )
    pairs = {
        "dualpath_1p1d_basic_2p1d": (("1P1D", "dualpath"), ("2P1D", "basic")),
        "dualpath_2p1d_1p2d": (("2P1D", "dualpath"), ("1P2D", "dualpath")),
        "basic_1p1d_1p2d": (("1P1D", "basic"), ("1P2D", "basic")),
    }
    return [
        Figure.of(PAIR + name, 1.0, runs[one].jct_s / runs[other].jct_s)
        for name, (one, other) in pairs.items()
    ]


def online(bench: Bench, size: Size, note: Note) -> list[Figure]:
    if size.rate_precision is None:
        return []
    ratios = []
    for model, nodes in ((DS_27B, SWEEP[0]), (DS_660B, UNIT)):
        basic, dualpath = (
            bench.capacity(model, nodes, mode, size.rate_precision) for mode in ("basic", "dualpath")
        )
        note(f"online {model.name} {nodes}", f"basic {basic:.3f} agents/s, dualpath {dualpath:.3f} agents/s")
        ratios.append(dualpath / basic)
    return [
        Figure.of("online_capacity_27b", 1.67, ratios[0]),
        Figure.of("online_capacity_660b", 2.25, ratios[1]),
        Figure.of("online_capacity_mean", 1.96, fmean(ratios)),
    ]


def scale(bench: Bench, size: Size, note: Note) -> tuple[Figure, ScaleRun]:
    unit = bench.offline(DS_660B, UNIT, size.unit_agents, "dualpath", label="scale")
    nodes, agents = UNIT.times(size.units), size.unit_agents * size.units
    begun_s = time.process_time()
    large = bench.offline(DS_660B, nodes, agents, "dualpath", label="scale")
    cpu_s = time.process_time() - begun_s
    for name, outcome in ((f"{UNIT}", unit), (f"{nodes}", large)):
        note(f"scale {name}", _describe(outcome, unit))
    found = Figure.of("scale_jct_large_over_unit", 3201 / 3167, large.jct_s / unit.jct_s)
    return found, ScaleRun(sum(nodes) * Hardware().gpus_per_node, agents, large.turns, cpu_s)


def _speedup(runs: dict[str, Outcome]) -> float:
    return runs["basic"].jct_s / runs["dualpath"].jct_s


def _describe(found: Outcome, basic: Outcome) -> str:
    return (
        f"JCT {found.jct_s:,.0f} s ({basic.jct_s / found.jct_s:.2f}x), TTFT {found.ttft_s:.2f} s, "
        f"TPOT {found.tpot_s * 1e3:.0f} ms, links busy {found.prefill_storage_busy:.0%} (P) "
        f"{found.decode_storage_busy:.0%} (D), SNIC max/avg {found.storage_max_over_mean:.2f}, whole run "
        f"{found.storage_max_over_mean_total:.2f}, attention max/avg {found.attention_max_over_mean:.2f}"
    )
