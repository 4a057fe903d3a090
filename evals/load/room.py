"""Whether this machine has the memory and the cores that the load benchmark needs, asked before anything starts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import psutil

from dualpath_sgl.cpu_profile.plugin import HOST_RESERVE_BYTES
from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.load.plan import Plan
from dualpath_sgl.launch.config.cluster import ClusterConfig, Group, kv_bytes_per_token

GIB = 2**30
ENGINE_BYTES = round(1.2 * GIB)
"""Of one SGLang server of a tiny model on the CPU, pools apart."""
RELAY_BYTES = round(0.6 * GIB)
OTHERS_BYTES = 1 * GIB
"""Master, scheduler, collector, router and the benchmark itself."""
LEAST_CORES = 2
BUSY_LOAD = 0.5
"""Load average of a core that is not this benchmark's."""
WAIT_S = 90.0
LOOK_S = 2.0


def needed_bytes(configs: Sequence[ClusterConfig]) -> int:
    """Memory that clusters which run at a time need, with what SGLang leaves free beside host pools."""
    return sum(_cluster_bytes(config) for config in configs) + OTHERS_BYTES + HOST_RESERVE_BYTES


def check(plan: Plan, configs: Sequence[Sequence[ClusterConfig]], say: Callable[[str], None]) -> None:
    """`configs`: clusters that run at a time, together.  Raises EvalError."""
    cores = len(os.sched_getaffinity(0))
    if cores < LEAST_CORES:
        raise EvalError(f"{cores} core is too few for engines, store and relays: at least {LEAST_CORES}")
    most_bytes, free_bytes = max(map(needed_bytes, configs)), available_bytes()
    if free_bytes < most_bytes:
        raise EvalError(_too_little(most_bytes, free_bytes))
    load = os.getloadavg()[0]
    say(
        f"{cores} cores, load average {load:.1f}; {free_bytes / GIB:.1f} GiB free, at most "
        f"{most_bytes / GIB:.1f} needed; {plan.measurements} measurements"
    )
    if load > BUSY_LOAD * cores:
        say("something else computes here: figures will be worse and vary more")


def await_room(config: ClusterConfig) -> None:
    """Until what ran before has given its memory back.  Raises EvalError after WAIT_S."""
    wanted_bytes = needed_bytes([config])
    until_s = time.monotonic() + WAIT_S
    while (free_bytes := available_bytes()) < wanted_bytes:
        if time.monotonic() > until_s:
            raise EvalError(_too_little(wanted_bytes, free_bytes))
        time.sleep(LOOK_S)


def available_bytes() -> int:
    """As SGLang asks."""
    return psutil.virtual_memory().available


def _cluster_bytes(config: ClusterConfig) -> int:
    engines = sum(group.count * _engine_bytes(config, group) for group in (config.prefill, config.decode))
    return engines + config.store.segment_bytes + RELAY_BYTES * len(config.relay_names)


def _engine_bytes(config: ClusterConfig, group: Group) -> int:
    device_bytes = (group.max_total_tokens or 0) * kv_bytes_per_token(config)
    pool = group.host_pool
    host_bytes = pool.size_gb * 10**9 if pool.size_gb is not None else round((pool.ratio or 0) * device_bytes)
    return ENGINE_BYTES + device_bytes + host_bytes


def _too_little(wanted_bytes: int, free_bytes: int) -> str:
    return (
        f"{free_bytes / GIB:.1f} GiB of memory are free, and {wanted_bytes / GIB:.1f} are needed: end what else "
        "runs here, then repeat the command (what is measured stays)"
    )
