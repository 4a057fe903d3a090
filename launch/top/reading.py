"""One look at a cluster: what its scheduler says, and what its engines' metrics ports say.

Either may be away: engines are asked all the same where their addresses are known, and the scheduler tells of
engines that cannot be reached.
"""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from scheduler_svc.wire.client import SchedulerClient, SchedulerError
from scheduler_svc.wire.protocol import Status

PREFIX = "dualpath_rank_"
ASK_S = 2.0
AT_ONCE = 32
"""Engines asked at the same time."""


class RankName(NamedTuple):
    engine: str
    role: str
    rank: str


Samples = dict[tuple[str, str], float]
"""By metric, without `dualpath_rank_`, and the value of the one label that is looked at (see `_LABEL`)."""
_LABEL = {
    "pages_total": "source",
    "kv_bytes_total": "source",
    "link_bytes_total": "link",
    "requests_total": "outcome",
    "fallbacks_total": "reason",
    "info": "mode",
}


@dataclass(frozen=True)
class Reading:
    at_s: float
    """Monotonic."""
    status: Status | None
    """None while the scheduler does not answer, or none is known."""
    problem: str | None = None
    """Why it does not."""
    ranks: dict[RankName, Samples] = field(default_factory=dict)
    silent: tuple[str, ...] = ()
    """Metrics addresses that did not answer with metrics of ours."""


class Looker:
    """Asks for one reading after the other.  For one thread; use it as a context manager."""

    def __init__(
        self, scheduler: str | None, keys: tuple[Path, Path] | None, metrics_urls: Iterable[str] = ()
    ) -> None:
        """`metrics_urls`: of engines; those that the scheduler knows are asked too.  Raises KeyFileError."""
        self._client = SchedulerClient(scheduler, curve_key_files=keys) if scheduler is not None else None
        self._urls = set(metrics_urls)
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="scrape")

    def __enter__(self) -> Looker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._client is not None:
            self._client.close()

    def look(self) -> Reading:
        status, problem = self._ask()
        if status is not None:
            self._urls |= {metrics_url(engine.engine.url) for engine in status.engines}
        at_s = time.monotonic()
        urls = sorted(self._urls)
        ranks: dict[RankName, Samples] = {}
        silent = []
        for url, found in zip(urls, self._pool.map(_scrape, urls), strict=True):
            ranks |= found
            if not found:
                silent.append(url)
        return Reading(at_s, status, problem, ranks, tuple(silent))

    def _ask(self) -> tuple[Status | None, str | None]:
        if self._client is None:
            return None, None
        try:
            return self._client.status(ASK_S), None
        except (TimeoutError, SchedulerError) as error:
            return None, str(error)


def metrics_url(engine_url: str) -> str:
    return f"{engine_url.rstrip('/')}/metrics"


def _scrape(url: str) -> dict[RankName, Samples]:
    """Empty when nothing of ours comes."""
    try:
        with urllib.request.urlopen(url, timeout=ASK_S) as answer:
            return parsed(answer.read().decode())
    except (OSError, ValueError):
        return {}


def parsed(text: str) -> dict[RankName, Samples]:
    """By rank.  Raises ValueError for what is no exposition."""
    found: dict[RankName, Samples] = {}
    for family in text_string_to_metric_families(text):
        if not family.name.startswith(PREFIX):
            continue
        for sample in family.samples:
            name = sample.name.removeprefix(PREFIX)
            labels: Mapping[str, str] = sample.labels
            rank = RankName(labels.get("engine", ""), labels.get("role", ""), labels.get("rank", ""))
            label = _LABEL.get(name)
            key = name, labels.get(label, "") if label else ""
            samples = found.setdefault(rank, {})
            samples[key] = samples.get(key, 0.0) + sample.value
    return found
