"""Quantiles by nearest rank."""

from __future__ import annotations

from collections.abc import Sequence


def nearest_rank(ordered: Sequence[float], share: float) -> float:
    """The value below which so much of the values lies; `ordered`: ascending, not empty; `share`: 0 to 1."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
