"""How much of what session affinity counts on an engine really still has.

An engine evicts pages as it likes and tells nobody, but every request reports what it found there:
the share of the expected pages, over the last requests, is what may be expected of the next one.
"""

from __future__ import annotations

from collections import OrderedDict

SHARE_MEMORY = 0.9
"""What the earlier requests still count after one more."""
MAX_EXPECTED = 1024
"""Requests placed and not reported; the oldest is forgotten first."""


class KeptPages:
    """One per engine."""

    __slots__ = ("_expected", "share")

    def __init__(self) -> None:
        self.share = 1.0
        """Part of the expected pages that was found; 1 until the first request."""
        self._expected: OrderedDict[int, int] = OrderedDict()
        """Pages by room."""

    def expect(self, room: int, pages: int) -> None:
        """The request of `room` would find so many if nothing had been evicted."""
        if pages > 0:
            self._expected[room] = pages
            if len(self._expected) > MAX_EXPECTED:
                self._expected.popitem(last=False)

    def found(self, room: int, pages: int) -> None:
        """It found so many; other sessions' pages that it shares may make them more."""
        expected = self._expected.pop(room, 0)
        if expected:
            share = min(1.0, pages / expected)
            self.share = SHARE_MEMORY * self.share + (1 - SHARE_MEMORY) * share
