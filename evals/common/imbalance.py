"""How unevenly work is spread."""

from __future__ import annotations

from collections.abc import Collection


def max_over_mean(values: Collection[float]) -> float:
    """The largest value over the mean, 1 when all are equal; the values' sum must be above 0."""
    return max(values) * len(values) / sum(values)
