"""Small clusters whose times can be worked out by hand."""

from __future__ import annotations

from dualpath_sgl.evals.sim.model.cluster import Outcome, Simulation
from dualpath_sgl.evals.sim.model.hardware import Hardware
from dualpath_sgl.evals.sim.model.models import Dense
from dualpath_sgl.evals.sim.model.setup import MODES, Mode, Setup
from dualpath_sgl.evals.sim.model.workload import PAGE_TOKENS, Lengths, Trajectory, Workload, workload

MODEL = Dense("small", layers=4, hidden=256, inner=512, heads=4, kv_heads=4, head=64, value_bytes=2)
"""4 KiB of KV a token."""

FAST_COMPUTE = Hardware(
    gpus_per_node=1, storage_bytes_per_s=1e8, compute_bytes_per_s=1e12, prefill_flop_per_s=1e16
)
"""Storage is what takes time."""


def trajectory(turns: int, context_pages: int = 100, new_tokens: int = 64, output: int = 1) -> Trajectory:
    """Turns that each find `context_pages` stored, the first one included."""
    hit = context_pages * PAGE_TOKENS
    return tuple(Lengths(hit + new_tokens, hit, output) for _ in range(turns))


def load(
    trajectories: list[Trajectory], agents: int, hardware: Hardware = FAST_COMPUTE, seed: int = 1
) -> Workload:
    return workload(trajectories, agents, MODEL, hardware, seed)


def setup(
    mode: str | Mode, hardware: Hardware = FAST_COMPUTE, nodes: tuple[int, int] = (1, 1), **settings
) -> Setup:
    return Setup(MODEL, hardware, *nodes, MODES[mode] if isinstance(mode, str) else mode, **settings)


def simulate(cluster: Setup, agents: Workload) -> tuple[Simulation, Outcome]:
    simulation = Simulation(cluster, agents)
    return simulation, simulation.run_offline()
