"""How fast a storage link brings what is asked of it."""

from __future__ import annotations

import threading
import time

HALF_S = 2.0
"""Time spent reading after which what was measured before counts half."""


class DrainRate:
    """Bytes over the time in which at least one read was under way.  From any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way = 0
        self._counted_s = 0.0
        """Until when time is counted, while a read is under way."""
        self._recent_bytes = 0.0
        self._recent_s = 0.0

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
            elapsed_s, self._counted_s = now_s - self._counted_s, now_s
            self._under_way -= 1
            kept = 0.5 ** (elapsed_s / HALF_S)
            self._recent_bytes = kept * self._recent_bytes + byte_count
            self._recent_s = kept * self._recent_s + elapsed_s

    @property
    def bytes_per_s(self) -> float:
        """0 until something has been read."""
        with self._lock:
            return self._recent_bytes / self._recent_s if self._recent_s > 0 else 0.0
