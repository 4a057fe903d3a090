"""A storage link of one engine's own, imagined: every read takes as long as on it.

Reads of one engine share its rate in the order in which they end.  `launch` writes the rate into the
engines' flags, so this imports nothing of SGLang.
"""

from __future__ import annotations

import threading
import time
from typing import Any

READ_RATE_KEY = "read_rate_bytes_per_s"
"""In `--hicache-storage-backend-extra-config`."""


class ReadLimit:
    """Delays whoever has read `count` bytes until a link of `rate_bytes_per_s` had brought them."""

    def __init__(self, rate_bytes_per_s: float) -> None:
        self._rate_bytes_per_s = rate_bytes_per_s
        self._free_s = 0.0
        """Monotonic time at which the imagined link has brought everything so far."""
        self._lock = threading.Lock()

    def pace(self, count: int, begun_s: float) -> None:
        """`count` bytes were read by a call that began at `begun_s` (monotonic): wait for the link."""
        with self._lock:
            self._free_s = max(self._free_s, begun_s) + count / self._rate_bytes_per_s
            until_s = self._free_s
        time.sleep(max(0.0, until_s - time.monotonic()))


def read_limit(extra_config: dict[str, Any]) -> ReadLimit | None:
    """The limit that a backend's extra configuration asks for.  Raises ValueError."""
    rate = extra_config.get(READ_RATE_KEY)
    if rate is None:
        return None
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not rate > 0:
        raise ValueError(
            f"{READ_RATE_KEY} is {rate!r} in --hicache-storage-backend-extra-config: give bytes per "
            "second above 0, or leave it out for no limit"
        )
    return ReadLimit(rate)
