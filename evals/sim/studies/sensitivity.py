"""How the headline speed-ups move when an assumption is turned."""

from __future__ import annotations

from typing import NamedTuple

from dualpath_sgl.evals.sim.model.hardware import Hardware
from dualpath_sgl.evals.sim.model.models import DS_27B, DS_660B
from dualpath_sgl.evals.sim.studies.bench import SEED, Bench, Nodes

CLUSTERS = ((DS_660B, Nodes(2, 4)), (DS_27B, Nodes(1, 1)))
TURNED = {"prefill_flop_per_s": 0.25, "layer_step_s": 0.25, "hbm_bytes": 0.10}
"""Fields of `Hardware` that the paper does not give, and by what share.  With 25 % less memory the
660B's weights would not fit at all."""


class Variation(NamedTuple):
    name: str
    speedup_660b: float
    """2P4D."""
    speedup_27b: float
    """1P1D."""


def variations(bench: Bench, agents: int) -> list[Variation]:
    """Each with `agents` agents of 64K unless it says otherwise."""
    default = Hardware()
    found = [_variation(bench, f"as calibrated, {agents:,} agents", agents)]
    for name, share in TURNED.items():
        for change in (-share, share):
            turned = default.model_copy(update={name: getattr(default, name) * (1 + change)})
            found.append(_variation(bench, f"{name} {change:+.0%}", agents, hardware=turned))
    indexed = [
        (model._replace(token_bytes=model.token_bytes + model.index_dim + 4), nodes)
        for model, nodes in CLUSTERS
    ]
    found.append(_variation(bench, "KV with the indexer's keys", agents, indexed))
    two_byte = [(model._replace(token_bytes=2 * (512 + 64)), nodes) for model, nodes in CLUSTERS]
    found.append(_variation(bench, "KV of two bytes a value", agents, two_byte))
    drawn = bench.trajectories("64k", SEED + 1)
    found.append(_variation(bench, "other trajectories (next seed)", agents, trajectories=drawn))
    found.append(_variation(bench, "the service's whole state object", agents, scheduler="service"))
    return found


def _variation(bench: Bench, name: str, agents: int, clusters=CLUSTERS, **settings) -> Variation:
    return Variation(
        name, *(bench.speedup(model, nodes, agents, label=name, **settings) for model, nodes in clusters)
    )
