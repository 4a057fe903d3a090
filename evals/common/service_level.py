"""The highest rate that keeps a service level, and when a run at one rate has shown enough."""

from __future__ import annotations

from collections.abc import Callable


def capacity(met: Callable[[float], bool], first: float, precision: float) -> float:
    """The highest rate for which `met` holds, to a relative `precision`; `met` holds for low rates only.

    Doubles or halves from `first` to enclose it, then bisects (geometrically: it is a ratio that
    is wanted).
    """
    low, high = first, first
    if met(first):
        high *= 2
        while met(high):
            low, high = high, 2 * high
    else:
        low /= 2
        while not met(low):
            low, high = low / 2, low
    while high / low > 1 + precision:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if met(middle) else (low, middle)
    return (low * high) ** 0.5


class Steadiness:
    """Whether windows' means have become what they were `compared` windows before."""

    def __init__(self, compared: int, tolerance: float) -> None:
        self._compared = compared
        self._tolerance = tolerance
        self._history: list[float] = []

    def add(self, mean: float) -> bool:
        """The next window's mean; whether it lies within `tolerance` of the earlier one's."""
        self._history.append(mean)
        if len(self._history) <= self._compared:
            return False
        before = self._history[-1 - self._compared]
        return before > 0 and abs(mean - before) <= self._tolerance * before
