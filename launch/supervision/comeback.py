"""When a part of a running cluster that died is started again: soon at first, later while it keeps dying."""

from __future__ import annotations

from dataclasses import dataclass, field

FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 30.0
MEMORY_S = 60.0
"""Deaths further apart than this (and the delay between them) have nothing to do with each other."""
MANY_DEATHS = 5
"""So many in a row are no accident."""


@dataclass
class Comeback:
    """One part's deaths.  Times are time.monotonic()."""

    restarts: int = 0
    deaths_in_a_row: int = 0
    due_s: float | None = None
    """When it is started again; None while it runs."""
    _last_death_s: float = field(default=float("-inf"))

    @property
    def alarming(self) -> bool:
        """With this death, and once in a row of them: it will not get well by itself."""
        return self.deaths_in_a_row == MANY_DEATHS

    def died(self, now_s: float) -> float:
        """Plans the next start; returns the seconds until then."""
        if now_s - self._last_death_s > MEMORY_S + self._delay_s:
            self.deaths_in_a_row = 0
        self.deaths_in_a_row += 1
        self._last_death_s = now_s
        self.due_s = now_s + self._delay_s
        return self._delay_s

    def started(self) -> None:
        self.due_s = None
        self.restarts += 1

    @property
    def _delay_s(self) -> float:
        return min(FIRST_DELAY_S * 2 ** (self.deaths_in_a_row - 1), LONGEST_DELAY_S)
