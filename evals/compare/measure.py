"""Reads the counters of a running cluster: from the scheduler, or from SGLang's metrics."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.common.nearest_rank import nearest_rank
from dualpath_sgl.evals.compare.summary import EngineRead, Quantiles
from dualpath_sgl.launch.config.cluster import Mode
from dualpath_sgl.launch.supervision.cluster import Cluster
from dualpath_sgl.launch.supervision.direct_http import fetch
from scheduler_svc.wire.protocol import Status

PREFETCHED_TOKENS = "sglang:prefetched_tokens_total"
"""Tokens an engine read from storage into its host pool
(sglang/srt/observability/metrics_collector.py, StorageMetricsCollector)."""
METRICS_TIMEOUT_S = 10.0
SETTLE_TIMEOUT_S = 10.0
"""Engines report what they did soon after the answer; longer than this is not waited for."""
SETTLE_POLL_S = 0.2


class Counters(NamedTuple):
    """What a cluster did since its start."""

    engines: dict[str, EngineRead]
    paths: dict[str, int]
    fallbacks: dict[str, int]
    duplicate_store_pages: int | None

    def since(self, before: Counters) -> Counters:
        """What was counted after `before`."""
        return Counters(
            engines={
                name: EngineRead(
                    role=read.role,
                    store_read_bytes=read.store_read_bytes - before.engines[name].store_read_bytes,
                    forwarded_bytes=read.forwarded_bytes - before.engines[name].forwarded_bytes,
                )
                for name, read in self.engines.items()
            },
            paths={path: count - before.paths.get(path, 0) for path, count in self.paths.items()},
            fallbacks={
                reason: count - before.fallbacks.get(reason, 0)
                for reason, count in self.fallbacks.items()
                if count > before.fallbacks.get(reason, 0)
            },
            duplicate_store_pages=None
            if self.duplicate_store_pages is None or before.duplicate_store_pages is None
            else self.duplicate_store_pages - before.duplicate_store_pages,
        )


def of(cluster: Cluster) -> Counters:
    """Counters of a running cluster, once every request it answered is reported."""
    if cluster.config.mode is not Mode.DECODE_SIDE:
        engines = [(engine.name, engine.role.value, engine.url) for engine in cluster.engines]
        return from_engines(engines, cluster.kv_bytes_per_token)
    with cluster.ask_scheduler() as client:
        deadline_s = time.monotonic() + SETTLE_TIMEOUT_S
        while (status := client.status()).rooms_open and time.monotonic() < deadline_s:
            time.sleep(SETTLE_POLL_S)
    return from_scheduler(status)


def from_scheduler(status: Status) -> Counters:
    """Counters of a DualPath cluster; the ranks of an engine are added up."""
    engines: dict[str, EngineRead] = {}
    for rank in status.engines:
        name = rank.engine.engine_id
        before = engines.get(name)
        engines[name] = EngineRead(
            role=rank.engine.role.value,
            store_read_bytes=rank.store_read_bytes + (before.store_read_bytes if before else 0),
            forwarded_bytes=rank.forwarded_bytes + (before.forwarded_bytes if before else 0),
        )
    return Counters(
        engines=engines,
        paths={path.value: count for path, count in status.paths.items()},
        fallbacks=dict(status.fallbacks),
        duplicate_store_pages=status.duplicate_store_pages,
    )


def from_engines(engines: Iterable[tuple[str, str, str]], bytes_per_token: int) -> Counters:
    """Counters of an upstream cluster; `engines` are (name, role, url).

    There nobody plans paths or counts duplicates.  Raises EvalError when metrics cannot be read.
    """
    reads = {
        name: EngineRead(
            role=role,
            # Every rank counts the same tokens; a rank holds its share of a token's bytes.
            store_read_bytes=round(max(counter(url, PREFETCHED_TOKENS), default=0) * bytes_per_token),
            forwarded_bytes=0,
        )
        for name, role, url in engines
    }
    return Counters(engines=reads, paths={}, fallbacks={}, duplicate_store_pages=None)


def counter(url: str, name: str) -> list[float]:
    """The samples of a counter at `url`/metrics; empty when the server has not counted yet."""
    try:
        text = fetch(f"{url}/metrics", METRICS_TIMEOUT_S).decode()
    except OSError as error:
        raise EvalError(
            f"{url}/metrics cannot be read: {error}; was the engine started with --enable-metrics?"
        ) from None
    return [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    ]


def quantiles(values_s: Sequence[float]) -> Quantiles:
    """p50, p99 (nearest rank) and mean; zeros when there are no values."""
    if not values_s:
        return Quantiles(p50=0, p99=0, mean=0)
    ordered = sorted(values_s)
    return Quantiles(
        p50=nearest_rank(ordered, 0.5), p99=nearest_rank(ordered, 0.99), mean=statistics.fmean(ordered)
    )
