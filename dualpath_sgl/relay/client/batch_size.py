"""How much a lane claims at a time: what takes it a while, whatever its speed.

Every batch costs some milliseconds beside its bytes: messages, and waiting for the interpreter that the
engine's own loop keeps busy.
"""

from __future__ import annotations

import time

BATCH_S = 0.05


class BatchSize:
    """Of one lane; for one thread at a time."""

    def __init__(self, least_bytes: int) -> None:
        self._least_bytes = least_bytes
        self._bytes = 0.0
        self._took_s = 0.0
        """Of the last batches; each weighs half as much as the one after it."""
        self._landed_s = 0.0

    @property
    def wanted_bytes(self) -> int:
        rate = self._bytes / self._took_s if self._took_s else 0.0
        return max(self._least_bytes, int(rate * BATCH_S))

    def landed(self, byte_count: int, asked_s: float) -> None:
        """A batch that was asked for at `asked_s` (monotonic) is there; the one before it may have come since."""
        now_s = time.monotonic()
        self._took_s = self._took_s / 2 + now_s - max(asked_s, self._landed_s)
        self._bytes = self._bytes / 2 + byte_count
        self._landed_s = now_s
