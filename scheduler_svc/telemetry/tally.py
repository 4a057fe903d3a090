"""Counters and histograms that cost a dictionary look-up to feed.

`prometheus_client`'s own take a lock and several calls for each increment, an eighth of the
scheduler's time for a request.  Here one thread adds, and a scrape on another thread copies:
copying a dictionary or a row is one step for the interpreter, so a scrape misses at most the
observation under way.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.samples import Exemplar

MAX_SERIES = 20_000
"""Most series of one counter: engines come and go under new names for months."""
OTHER = "other"
"""Label of what is counted beyond that."""


class CounterTally:
    """A Prometheus counter; `add` must be called from one thread only."""

    def __init__(
        self,
        registry: CollectorRegistry,
        name: str,
        text: str,
        labels: Sequence[str] = (),
        known: Iterable[tuple[str, ...]] = (),
    ) -> None:
        """`known` labels exist from the start, so that a rise from 0 is seen.  Without labels the series does."""
        self._name, self._text, self._labels = name, text, tuple(labels)
        self._values: dict[tuple[str, ...], float] = dict.fromkeys(known if labels else [()], 0)
        registry.register(self)

    def add(self, amount: float, *labels: str) -> None:
        try:
            self._values[labels] += amount
        except KeyError:
            if len(self._values) >= MAX_SERIES:
                labels = (OTHER,) * len(labels)
            self._values[labels] = self._values.get(labels, 0) + amount

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for labels, value in self._values.copy().items():
            family.add_metric(labels, value)
        yield family


class HistogramTally:
    """A Prometheus histogram; `observe` must be called from one thread only."""

    def __init__(
        self,
        registry: CollectorRegistry,
        name: str,
        text: str,
        buckets: Sequence[float],
        labels: Sequence[str] = (),
        known: Iterable[tuple[str, ...]] = (),
    ) -> None:
        """`buckets` are upper bounds, ascending, not negative (a histogram with negative bounds is
        exposed without sum and count) and without infinity.  `known` as in `CounterTally`.
        """
        self._name, self._text, self._labels = name, text, tuple(labels)
        self._bounds = tuple(buckets)
        self._rows: dict[tuple[str, ...], list[float]] = {}
        """Count per bucket, not cumulative, then of what is above every bound; last the sum."""
        self._exemplars: dict[tuple[tuple[str, ...], int], Exemplar] = {}
        """The last one of a bucket."""
        for values in known if labels else [()]:
            self._rows[values] = self._new_row()
        registry.register(self)

    def observe(self, value: float, *labels: str, trace_id: str | None = None) -> None:
        """`trace_id`: of an exported trace in which it happened (32 hexadecimal digits)."""
        try:
            row = self._rows[labels]
        except KeyError:
            row = self._rows[labels] = self._new_row()
        bucket = bisect_left(self._bounds, value)
        row[bucket] += 1
        row[-1] += value
        if trace_id is not None:
            self._exemplars[labels, bucket] = Exemplar({"trace_id": trace_id}, value, time.time())

    def _new_row(self) -> list[float]:
        return [0] * (len(self._bounds) + 1) + [0.0]

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        for labels, row in self._rows.copy().items():
            *counts, total = row.copy()
            cumulative = 0.0
            buckets: list[Any] = []
            for index, (bound, count) in enumerate(zip((*self._bounds, "+Inf"), counts, strict=True)):
                cumulative += count
                exemplar = self._exemplars.get((labels, index))
                buckets.append((str(bound), cumulative) + ((exemplar,) if exemplar is not None else ()))
            family.add_metric(labels, buckets, total)
        yield family
