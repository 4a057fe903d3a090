"""A mode's name, and the cluster that it means."""

from __future__ import annotations

from dualpath_sgl.evals.compare import run
from dualpath_sgl.launch.config.cluster import ClusterConfig, Mode

ORACLE = "oracle"
"""Upstream with a prefill pool that holds every agent's context: nothing is read from the store, so it shows what is
left when loading costs nothing."""
DEFAULT = "default"
"""As the cluster file says."""
MODES: tuple[str, ...] = (*run.MODES, DEFAULT, ORACLE)
_SLACK = 1.1


def cluster_of(
    base: ClusterConfig, mode: str, prefill: int, decode: int, context_tokens: int
) -> ClusterConfig:
    """The cluster of a mode and a topology; `context_tokens`: what all agents' contexts need at the most."""
    config = base.model_copy(
        update={
            "prefill": base.prefill.model_copy(update={"count": prefill}),
            "decode": base.decode.model_copy(update={"count": decode}),
        }
    )
    if mode == DEFAULT:
        return config
    if mode != ORACLE:
        return run.cluster_config(config, mode)
    prefill_group, pool = config.prefill, config.prefill.max_total_tokens
    if pool is not None:
        wanted = max(pool, round(context_tokens * _SLACK))
        prefill_group = prefill_group.model_copy(update={"max_total_tokens": wanted})
    return config.model_copy(update={"mode": Mode.BASIC, "prefill": prefill_group})
