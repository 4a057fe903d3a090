"""A log that a flood of messages cannot fill."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable

MOST_LINES = 10
PERIOD_S = 10.0


class LimitedLog:
    """Writes `MOST_LINES` of each kind of line in `PERIOD_S`; of the others only how many there were.

    A kind is a format string and its level, so their number is that of the calls in the source.
    For one thread.
    """

    def __init__(self, logger: logging.Logger, now_s: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._now_s = now_s
        self._begun_s = now_s()
        self._seen: Counter[tuple[int, str]] = Counter()

    def log(self, level: int, text: str, *arguments: object, exc_info: bool = False) -> None:
        self.tick()
        self._seen[level, text] += 1
        if self._seen[level, text] <= MOST_LINES:
            self._logger.log(level, text, *arguments, exc_info=exc_info)

    def tick(self) -> None:
        """Say how many lines were left out, once their period is over; call it now and then."""
        now_s = self._now_s()
        if now_s - self._begun_s < PERIOD_S:
            return
        for (level, text), count in self._seen.items():
            if count > MOST_LINES:
                self._logger.log(
                    level, "%d more within %.0f s like %r", count - MOST_LINES, now_s - self._begun_s, text
                )
        self._seen.clear()
        self._begun_s = now_s
