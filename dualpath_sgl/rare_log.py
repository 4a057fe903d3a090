"""Log lines that others cause, and that must not fill a disk."""

from __future__ import annotations

import logging
import time

INTERVAL_S = 10.0


class RareLog:
    """One line in `INTERVAL_S`; the next one says how many were left out.  For one thread."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._next_s = 0.0
        self._left_out = 0

    def warning(self, message: str, *arguments: object) -> None:
        now_s = time.monotonic()
        if now_s < self._next_s:
            self._left_out += 1
            return
        if self._left_out:
            message += f" (and {self._left_out} like it before)"
        self._logger.warning(message, *arguments)
        self._next_s, self._left_out = now_s + INTERVAL_S, 0
