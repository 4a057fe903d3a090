"""Loads of this rank that SGLang has not got back: a lane may still write to their host memory.

SGLang forgets an aborted prefetch at once and believes itself idle, while the lanes still finish
the transfer that is under way.  Whoever drops the cache, or takes the storage away, waits here first:
an acknowledgement that came after it would free pages that have a new owner.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import Protocol

DRAIN_S = 40.0
"""How long SGLang itself waits at most for its four storage threads (10 s each)."""


class Load(Protocol):
    """A `PageLoad`."""

    def stop(self) -> None: ...


class OpenLoads:
    """Safe from any thread."""

    def __init__(self) -> None:
        self._loads: set[Load] = set()
        self._changed = threading.Condition()
        self.arrived_bytes: Counter[str] = Counter()
        """By lane, since the rank began."""

    def __len__(self) -> int:
        return len(self._loads)

    def add(self, load: Load) -> None:
        with self._changed:
            self._loads.add(load)

    def remove(self, load: Load) -> None:
        """SGLang has its last acknowledgement."""
        with self._changed:
            self._loads.discard(load)
            self._changed.notify_all()

    def arrived(self, lane: str, byte_count: int) -> None:
        """Through a lane, of any load."""
        with self._changed:
            self.arrived_bytes[lane] += byte_count

    def drain(self, timeout_s: float = DRAIN_S) -> None:
        """Ask every lane to stop after its current transfer, and wait until all are acknowledged.

        Raises RuntimeError after `timeout_s`: what follows would hand out memory that is still written to.
        """
        with self._changed:
            for load in self._loads:
                load.stop()
            if not self._changed.wait_for(lambda: not self._loads, timeout_s):
                raise RuntimeError(
                    f"DualPath: {len(self._loads)} loads still write into the host pool after {timeout_s:g} s; "
                    "their storage or their peer hangs"
                )
