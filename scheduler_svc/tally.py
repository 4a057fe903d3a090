"""Counters and histograms that cost a dictionary look-up to feed.

`prometheus_client`'s own take a lock and several calls for each increment, an eighth of the
scheduler's time for a request.  Here one thread adds, and a scrape on another thread copies:
copying a dictionary is one step for the interpreter, and a histogram's row is replaced whole.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily


class CounterTally:
    """A Prometheus counter; `add` must be called from one thread only."""

    def __init__(self, registry: CollectorRegistry, name: str, text: str, labels: Sequence[str] = ()) -> None:
        self._name, self._text, self._labels = name, text, tuple(labels)
        self._values: dict[tuple[str, ...], float] = {}
        registry.register(self)

    def add(self, amount: float, *labels: str) -> None:
        self._values[labels] = self._values.get(labels, 0.0) + amount

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
    ) -> None:
        """`buckets` are upper bounds, ascending, not negative (a histogram with negative bounds is
        exposed without sum and count) and without infinity.
        """
        self._name, self._text, self._labels = name, text, tuple(labels)
        self._bounds = tuple(buckets)
        self._rows: dict[tuple[str, ...], tuple[float, list[int]]] = {}
        """Sum, and count per bucket, not cumulative; the last is above every bound."""
        registry.register(self)

    def observe(self, value: float, *labels: str) -> None:
        total, counts = self._rows.get(labels) or (0.0, [0] * (len(self._bounds) + 1))
        counts[bisect_left(self._bounds, value)] += 1
        self._rows[labels] = (total + value, counts)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        for labels, (total, counts) in self._rows.copy().items():
            cumulative, buckets = 0, []
            for bound, count in zip((*self._bounds, "+Inf"), counts.copy(), strict=True):
                cumulative += count
                buckets.append((str(bound), cumulative))
            family.add_metric(labels, buckets, total)
        yield family
