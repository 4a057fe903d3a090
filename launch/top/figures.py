"""Two looks at a cluster become figures: rates over the time between them, and sums so far.

A counter that is smaller than before began anew: its process was started again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from dualpath_sgl.launch.top.reading import RankName, Reading, Samples
from scheduler_svc.wire.protocol import EngineStatus, Path, Status

Number = TypeVar("Number", int, float)
LINKS = ("store", "relay", "peer")
SOURCES = ("device", "host", "peer", "relay", "store", "recomputed")


@dataclass
class EngineFigures:
    """One engine, all its ranks together."""

    engine: str
    role: str
    mode: str
    age_s: float | None = None
    """Since the scheduler heard of it; None while that is not known."""
    connected: bool | None = None
    """Whether it is, says the engine itself."""
    sequences: int = 0
    tokens: int = 0
    queued_bytes: int = 0
    links_bytes_per_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LINKS, 0.0))
    faults: int = 0
    held: int = 0
    answers: bool = False
    """Its metrics port does."""


@dataclass
class RelayFigures:
    relay: str
    age_s: float
    clients: int
    queued_bytes: int
    read_bytes_per_s: float
    ring_free_bytes: int
    ring_bytes: int
    draining: bool
    faults: int


@dataclass
class Figures:
    """`--json` prints just this."""

    over_s: float
    """Between the two looks."""
    scheduler: str | None
    """`answers`, or why not; None where none is asked."""
    policy: str | None
    rooms_open: int | None
    engines: list[EngineFigures]
    relays: list[RelayFigures]
    links_bytes_per_s: dict[str, float]
    """Of all engines; `relay reads`: of all relays from the store."""
    paths: dict[str, int]
    """Rooms planned since the scheduler began."""
    paths_now: dict[str, int]
    """Between the two looks."""
    pages: dict[str, int]
    """Of prompts that were served, by where they came from, since the engines began."""
    hit_rate: float | None
    """Needed pages over all pages of prompts; between the looks, or since the start if nothing came."""
    fallbacks: dict[str, int]
    faults: int
    """Exceptions in code of ours, on engines and relays."""
    silent: list[str]
    """Metrics addresses that did not answer."""

    def document(self) -> dict[str, Any]:
        return asdict(self)


def figures(before: Reading, now: Reading) -> Figures:
    """`before` and `now` may be the same look: then all rates are 0."""
    over_s = now.at_s - before.at_s
    engines = _engines(before, now, over_s)
    relays = _relays(before.status, now.status, over_s)
    links = {link: sum((engine.links_bytes_per_s[link] for engine in engines), 0.0) for link in LINKS}
    links["relay reads"] = sum((relay.read_bytes_per_s for relay in relays), 0.0)
    status = now.status
    paths = _paths(status)
    was = _paths(before.status)
    pages = _sum_of(now, "pages_total")
    return Figures(
        over_s=over_s,
        scheduler="answers" if status is not None else now.problem,
        policy=status.policy if status is not None else None,
        rooms_open=status.rooms_open if status is not None else None,
        engines=engines,
        relays=relays,
        links_bytes_per_s=links,
        paths=paths,
        paths_now={path: _grown(was.get(path, 0), count) for path, count in paths.items()},
        pages={source: int(pages[source]) for source in SOURCES if source in pages},
        hit_rate=_hit_rate(before, now),
        fallbacks=_fallbacks(now),
        faults=sum(engine.faults for engine in engines) + sum(relay.faults for relay in relays),
        silent=list(now.silent),
    )


def _paths(status: Status | None) -> dict[str, int]:
    """Always all of them, in the same order."""
    return {path.value: status.paths.get(path, 0) for path in Path} if status is not None else {}


def _engines(before: Reading, now: Reading, over_s: float) -> list[EngineFigures]:
    found: dict[str, EngineFigures] = {}
    was = {one.engine.engine_id: one for one in before.status.engines} if before.status is not None else {}
    for one in now.status.engines if now.status is not None else ():
        found[one.engine.engine_id] = _told(one, was.get(one.engine.engine_id), over_s)
    by_engine: dict[str, list[RankName]] = {}
    for rank in now.ranks:
        by_engine.setdefault(rank.engine, []).append(rank)
    for name, ranks in by_engine.items():
        engine = found.get(name)
        if engine is None:
            mode = next((label for key, label in now.ranks[ranks[0]] if key == "info"), "")
            engine = found[name] = EngineFigures(name, ranks[0].role, mode)
            engine.sequences = max(int(_gauge(now.ranks[rank], "sequences")) for rank in ranks)
            engine.tokens = max(int(_gauge(now.ranks[rank], "tokens")) for rank in ranks)
            engine.queued_bytes = sum(int(_gauge(now.ranks[rank], "read_queue_bytes")) for rank in ranks)
            engine.held = sum(int(_gauge(now.ranks[rank], "held")) for rank in ranks)
        engine.answers = True
        engine.connected = all(_gauge(now.ranks[rank], "scheduler_connected") for rank in ranks)
        engine.faults = max(
            engine.faults, sum(int(_gauge(now.ranks[rank], "faults_total")) for rank in ranks)
        )
        engine.links_bytes_per_s = {
            link: sum(
                _rate(before.ranks.get(rank), now.ranks[rank], ("link_bytes_total", link), over_s)
                for rank in ranks
            )
            for link in LINKS
        }
    return sorted(found.values(), key=lambda engine: (engine.role != "prefill", engine.engine))


def _told(now: EngineStatus, before: EngineStatus | None, over_s: float) -> EngineFigures:
    """By the scheduler, which hears of bytes when a room is over."""
    load = now.load
    engine = EngineFigures(
        now.engine.engine_id,
        now.engine.role.value,
        now.engine.mode.value,
        age_s=now.age_s,
        sequences=load.sequences,
        tokens=load.tokens,
        queued_bytes=load.read_queue_bytes,
        faults=load.faults,
        held=load.held,
    )
    if before is not None and over_s > 0:
        engine.links_bytes_per_s["store"] = _grown(before.store_read_bytes, now.store_read_bytes) / over_s
        engine.links_bytes_per_s["peer"] = _grown(before.forwarded_bytes, now.forwarded_bytes) / over_s
    return engine


def _relays(before: Status | None, now: Status | None, over_s: float) -> list[RelayFigures]:
    was = {one.relay.name: one.load.read_bytes for one in before.relays} if before is not None else {}
    return [
        RelayFigures(
            one.relay.name,
            one.age_s,
            one.load.clients,
            one.load.queue_bytes,
            _grown(was.get(one.relay.name, one.load.read_bytes), one.load.read_bytes) / over_s
            if over_s
            else 0.0,
            one.load.ring_free_bytes,
            one.relay.ring_bytes,
            one.load.draining,
            one.load.faults,
        )
        for one in (now.relays if now is not None else ())
    ]


def _hit_rate(before: Reading, now: Reading) -> float | None:
    """Ranks of an engine see the same prompts, so it does not matter how many they are."""
    for since in (before.ranks, dict.fromkeys(now.ranks, Samples())):
        prompt, needed = (
            sum(
                _grown(_gauge(since[rank], name), _gauge(samples, name))
                for rank, samples in now.ranks.items()
                if rank in since
            )
            for name in ("prompt_pages_total", "needed_pages_total")
        )
        if prompt:
            return needed / prompt
    return None


def _fallbacks(now: Reading) -> dict[str, int]:
    """By the engines, which count also while the scheduler is away; else by the scheduler."""
    if now.ranks:
        counted = _sum_of(now, "fallbacks_total")
        return {reason: int(count) for reason, count in sorted(counted.items())}
    return dict(now.status.fallbacks) if now.status is not None else {}


def _sum_of(now: Reading, name: str) -> Counter[str]:
    sums: Counter[str] = Counter()
    for samples in now.ranks.values():
        for (metric, label), value in samples.items():
            if metric == name:
                sums[label] += int(value)
    return sums


def _gauge(samples: Samples, name: str) -> float:
    return samples.get((name, ""), 0.0)


def _rate(
    before: Mapping[tuple[str, str], float] | None, now: Samples, key: tuple[str, str], over_s: float
) -> float:
    """0 for a rank that was not there before: what it had done by then is not of this time."""
    if before is None or over_s <= 0:
        return 0.0
    return _grown(before.get(key, 0.0), now.get(key, 0.0)) / over_s


def _grown(before: Number, now: Number) -> Number:
    return now - before if now >= before else now
