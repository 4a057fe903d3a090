"""Which slots of a piece of memory are taken."""

from __future__ import annotations


class Slots:
    """Equal parts of a memory.  What needs more than one gets neighbours.  For one thread."""

    def __init__(self, count: int) -> None:
        self._taken = bytearray(count)

    @property
    def count(self) -> int:
        return len(self._taken)

    @property
    def free_count(self) -> int:
        return self._taken.count(0)

    def take(self, count: int) -> int | None:
        """The first of `count` neighbours, which are taken from now on; None when there are none."""
        first = self._taken.find(bytes(count))
        if first < 0:
            return None
        self._taken[first : first + count] = b"\1" * count
        return first

    def give_back(self, first: int, count: int) -> None:
        """Raises ValueError unless all of them are taken."""
        if self._taken[first : first + count] != b"\1" * count:
            raise ValueError(f"slots {first} to {first + count} are not all taken")
        self._taken[first : first + count] = bytes(count)


def slots_for(byte_count: int, slot_bytes: int) -> int:
    """How many slots `byte_count` bytes need."""
    return -(-byte_count // slot_bytes)
