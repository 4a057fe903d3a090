"""From a trace of the experiment file to what agents play, and to when they come."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from dualpath_sgl.evals.agents import chat, lmcache, mooncake, table2, trace
from dualpath_sgl.evals.agents.chat import ChatWorkload, TextSession
from dualpath_sgl.evals.agents.replay import Pace
from dualpath_sgl.evals.agents.workload import Stretch, Workload, build
from dualpath_sgl.evals.matrix.experiment import (
    CapacityLoad,
    Load,
    OfflineLoad,
    OnlineLoad,
    TraceVariant,
)
from dualpath_sgl.evals.matrix.results import Traffic
from dualpath_sgl.launch.config.cluster import ClusterConfig


class Play(NamedTuple):
    """The agents of a cell."""

    workload: Workload | ChatWorkload
    traffic: Traffic


def play(variant: TraceVariant, agents: int, config: ClusterConfig, seed: int) -> Play:
    """Read or draw the sessions and scale them.  Raises EvalError."""
    choice, stretch = variant.choice, Stretch(variant.append, variant.generation)
    if choice.format == "lmcache-agent":
        texts = chat.build(
            _texts(_path(variant)),
            agents=agents,
            turns=choice.turns,
            max_context_tokens=choice.max_context,
            page_size=config.page_size,
            count=chat.counter(config.model.directory()),
            stretch=stretch,
        )
        return Play(texts, _traffic_of_texts(variant, texts, seed))
    workload = build(
        _sessions(variant, agents, seed),
        agents=agents,
        turns=choice.turns,
        max_context_tokens=choice.max_context,
        page_size=config.page_size,
        stretch=stretch,
    )
    return Play(workload, _traffic(variant, workload, seed))


def _sessions(variant: TraceVariant, agents: int, seed: int) -> Sequence[trace.TraceSession]:
    choice = variant.choice
    if choice.format == "table2":
        return table2.trajectories(table2.ROWS[choice.row], agents, seed)
    return _recorded(choice.format, _path(variant))


def _path(variant: TraceVariant) -> Path:
    assert variant.choice.path is not None, "checked with the experiment"
    return variant.choice.path


@lru_cache(maxsize=4)
def _texts(path: Path) -> list[TextSession]:
    return lmcache.load_text_sessions(path)


@lru_cache(maxsize=4)
def _recorded(trace_format: str, path: Path) -> list[trace.TraceSession]:
    """Read once for all loads: a set may have hundreds of files."""
    return mooncake.load_mooncake(path) if trace_format == "mooncake-fast25" else trace.load_sessions(path)


def _source(variant: TraceVariant) -> str:
    choice = variant.choice
    return f"the paper's Table 2, row {choice.row}" if choice.path is None else choice.path.name


def _traffic(variant: TraceVariant, workload: Workload, seed: int) -> Traffic:
    turns = [turn for session in workload.sessions for turn in session.turns]
    return Traffic(
        source=_source(variant),
        format=variant.choice.format,
        sessions=len(workload.sessions),
        requests=workload.requests,
        scale_factor=workload.factor,
        longest_tokens=workload.longest_tokens,
        raw_hit_rate=workload.raw_hit_rate,
        hit_rate=workload.hit_rate,
        new_tokens=sum(turn.new_tokens + turn.output_tokens for turn in turns),
        seed=seed,
    )


def _traffic_of_texts(variant: TraceVariant, workload: ChatWorkload, seed: int) -> Traffic:
    last = [session.turns[-1] for session in workload.sessions]
    return Traffic(
        source=_source(variant),
        format=variant.choice.format,
        sessions=len(workload.sessions),
        requests=workload.requests,
        scale_factor=workload.factor,
        longest_tokens=workload.longest_tokens,
        raw_hit_rate=None,
        hit_rate=None,
        new_tokens=sum(turn.prompt_tokens + turn.output_tokens for turn in last),
        seed=seed,
    )


def pace(load: Load, agents: int, seed: int, agents_per_s: float | None = None) -> Pace:
    """When the requests of a load are sent; `agents_per_s` of a probe of a capacity search."""
    thinking = Pace(think=load.think, longest_think_s=load.longest_think_s)
    match load:
        case OfflineLoad():
            return thinking._replace(concurrency=load.concurrency)
        case OnlineLoad():
            return thinking._replace(starts_s=poisson(agents, load.agents_per_s, seed))
        case CapacityLoad():
            assert agents_per_s is not None, "a probe has a rate"
            return thinking._replace(starts_s=poisson(agents, agents_per_s, seed))


def poisson(agents: int, agents_per_s: float, seed: int) -> list[float]:
    """When each agent comes, seconds: the time between two is exponential."""
    rng = random.Random(f"arrivals/{seed}")
    now_s, starts_s = 0.0, []
    for _ in range(agents):
        now_s += rng.expovariate(agents_per_s)
        starts_s.append(now_s)
    return starts_s


def seed_of(*parts: object) -> int:
    """The same parts give the same seed, others most likely another one."""
    return zlib.crc32("/".join(map(str, parts)).encode())
