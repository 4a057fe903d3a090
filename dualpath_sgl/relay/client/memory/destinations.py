"""Host memory of the engine that bytes may be copied into by a processor."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable


class Destinations:
    """Ranges of addresses, added before loads begin.  A backend may be asked to fill other memory, too."""

    def __init__(self) -> None:
        self._firsts: list[int] = []
        self._ends: list[int] = []

    def add(self, address: int, byte_count: int) -> None:
        """Adding what is known does nothing."""
        place = bisect_right(self._firsts, address)
        if self._holds(address, byte_count):
            return
        self._firsts.insert(place, address)
        self._ends.insert(place, address + byte_count)

    def hold(self, blocks: Iterable[tuple[int, int]]) -> bool:
        """Whether every block (address, bytes) lies in one of them."""
        return all(self._holds(address, byte_count) for address, byte_count in blocks)

    def _holds(self, address: int, byte_count: int) -> bool:
        place = bisect_right(self._firsts, address) - 1
        return place >= 0 and address + byte_count <= self._ends[place]
