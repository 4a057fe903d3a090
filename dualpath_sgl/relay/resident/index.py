"""Where a key's bytes lie in this engine's host memory."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

from dualpath_sgl.relay.resident.lives import Lives, Pages


class Place(NamedTuple):
    address: int
    byte_count: int
    lives: Lives
    page: int
    life: int

    @property
    def lasts(self) -> bool:
        """The bytes that were noted lie there still."""
        return self.lives.lasts(self.page, self.life)


class Index:
    """Any thread may call anything.  It holds at most one key for each address that was noted."""

    def __init__(self) -> None:
        self._places: dict[str, Place] = {}
        self._key_at: dict[int, str] = {}
        """The key noted last for an address, so that nothing is kept of what lies there no more."""
        self._lock = threading.Lock()
        """Between those who note."""

    def __len__(self) -> int:
        return len(self._places)

    def note(self, keys: Sequence[str], addresses: Sequence[int], sizes: Sequence[int], pages: Pages) -> None:
        """The bytes of `keys[i]` lie whole at `addresses[i]`.

        `pages`: those that they belong to, each with the same number of keys, as they were *before* the bytes
        were seen there.
        """
        parts = len(keys) // len(pages.numbers)
        if parts * len(pages.numbers) != len(keys):
            raise ValueError(f"{len(keys)} objects of {len(pages.numbers)} pages")
        with self._lock:
            for index, (key, address) in enumerate(zip(keys, addresses, strict=True)):
                before = self._places.get(key)
                if before is not None and before.lasts:
                    continue  # it lies there twice, and the later one may be a copy that is dropped next
                old = self._key_at.get(address)
                if old is not None and old != key:
                    self._forget(old, address)
                page = index // parts
                self._key_at[address] = key
                self._places[key] = Place(
                    address, sizes[index], pages.lives, pages.numbers[page], pages.counts[page]
                )

    def find(self, key: str) -> Place | None:
        place = self._places.get(key)
        return place if place is not None and place.lasts else None

    def clear(self) -> None:
        with self._lock:
            self._places.clear()
            self._key_at.clear()

    def _forget(self, key: str, address: int) -> None:
        place = self._places.get(key)
        if place is not None and place.address == address:
            del self._places[key]
