"""The least of many items whose keys keep changing, without looking at all of them."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)

SLACK_ENTRIES = 64
"""Outdated entries tolerated beyond three per item before the heap is rebuilt."""


class LazyHeap(Generic[Item]):
    """Items ordered by `key(item)`, which may change at any time.

    A key that grew is noticed when its item comes to the top.  A key that shrank must be
    announced with `lowered`.  Each costs O(log n).  Of equal keys the item that got its key
    first is the least, so equals take turns when being chosen raises the key.
    """

    def __init__(self, key: Callable[[Item], Any]) -> None:
        self._key = key
        self._heap: list[tuple[Any, int, Item]] = []
        self._current: dict[Item, tuple[Any, int]] = {}
        """Key and serial number of each item's valid entry; any other entry is outdated."""
        self._serial = 0

    def __len__(self) -> int:
        return len(self._current)

    def __contains__(self, item: Item) -> bool:
        return item in self._current

    def add(self, item: Item) -> None:
        """`item` must not be held yet."""
        self._push(item, self._key(item))

    def remove(self, item: Item) -> None:
        """Raises KeyError when `item` is not held."""
        del self._current[item]
        self._shrink()

    def lowered(self, item: Item) -> None:
        """The key of `item` may be less than it was."""
        key = self._key(item)
        if key < self._current[item][0]:
            self._push(item, key)
            self._shrink()

    def least(self) -> Item | None:
        """None when there is no item."""
        heap = self._heap
        while heap:
            key, serial, item = heap[0]
            current = self._current.get(item)
            if current is None or current[1] != serial:
                heapq.heappop(heap)
                continue
            actual = self._key(item)
            if actual == key:
                return item
            heapq.heappop(heap)
            self._push(item, actual)
        return None

    def _push(self, item: Item, key: Any) -> None:
        self._serial += 1
        self._current[item] = (key, self._serial)
        heapq.heappush(self._heap, (key, self._serial, item))

    def _shrink(self) -> None:
        if len(self._heap) > 4 * len(self._current) + SLACK_ENTRIES:
            self._heap = [(key, serial, item) for item, (key, serial) in self._current.items()]
            heapq.heapify(self._heap)
