"""How fast a storage link brings what is asked of it, and how fast an engine computes."""

from __future__ import annotations

import threading
import time

HALF_S = 2.0
"""Time at work after which what was measured before counts half."""


class RecentRate:
    """Amounts over the time that they took, the latest most.  For one thread."""

    def __init__(self) -> None:
        self._amount = 0.0
        self._seconds = 0.0

    def add(self, amount: float, seconds: float) -> None:
        kept = 0.5 ** (seconds / HALF_S)
        self._amount = kept * self._amount + amount
        self._seconds = kept * self._seconds + seconds

    @property
    def per_s(self) -> float:
        """0 until something was added."""
        return self._amount / self._seconds if self._seconds > 0 else 0.0


class DrainRate:
    """Bytes over the time in which at least one read was under way.  From any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way = 0
        self._counted_s = 0.0
        """Until when time is counted, while a read is under way."""
        self._recent = RecentRate()

    def begin(self) -> None:
        """A read begins; `end` must follow."""
        with self._lock:
            if not self._under_way:
                self._counted_s = time.monotonic()
            self._under_way += 1

    def end(self, byte_count: int) -> None:
        """A read is over and brought so much."""
        with self._lock:
            now_s = time.monotonic()
            self._recent.add(byte_count, now_s - self._counted_s)
            self._counted_s = now_s
            self._under_way -= 1

    @property
    def bytes_per_s(self) -> float:
        """0 until something has been read."""
        with self._lock:
            return self._recent.per_s
