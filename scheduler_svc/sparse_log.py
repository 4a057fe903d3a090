"""Warnings that a peer can cause as often as it likes: the first at once, then one in an interval."""

from __future__ import annotations

import logging
import time


class SparseLog:
    """For one thread."""

    def __init__(self, logger: logging.Logger, interval_s: float = 5.0) -> None:
        self._logger = logger
        self._interval_s = interval_s
        self._quiet_until_s = 0.0
        self._left_out = 0

    def warning(self, text: str, *arguments: object) -> None:
        now_s = time.monotonic()
        if now_s < self._quiet_until_s:
            self._left_out += 1
            return
        since = f" ({self._left_out} such lines left out)" if self._left_out else ""
        self._logger.warning(f"{text}%s", *arguments, since)
        self._left_out, self._quiet_until_s = 0, now_s + self._interval_s
