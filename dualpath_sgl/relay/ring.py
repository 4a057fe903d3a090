"""The ring: registered memory in which objects lie while they are read, leased, or just read.

What was just read is kept until its memory is needed, for `keep_s` at most: ranks that share their KV ask
for the same objects a moment apart, and each is read from the store once.  Keys name contents, but an
operator may clear a store and fill it anew, so nothing is kept for long.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from dualpath_sgl.relay.slots import Slots, slots_for


@dataclass(eq=False)
class Extent:
    """Neighbouring slots: the objects of one read, one after another."""

    address: int
    first: int
    count: int
    pins: int = 1
    """Reads into it, and leases on it."""
    objects: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Address and bytes of each object that lies here whole and can still be found."""
    read_s: float = 0.0


class Ring:
    def __init__(self, address: int, byte_count: int, slot_bytes: int, keep_s: float) -> None:
        self.address = address
        self._slot_bytes = slot_bytes
        self._keep_s = keep_s
        self._slots = Slots(byte_count // slot_bytes)
        self._kept: OrderedDict[Extent, None] = OrderedDict()
        """Nobody's, with objects in them; the one that was let go first comes first."""
        self._where: dict[str, Extent] = {}
        """The extent in which a key's object lies whole."""

    @property
    def free_bytes(self) -> int:
        """What is neither read into nor leased."""
        kept = sum(extent.count for extent in self._kept)
        return (self._slots.free_count + kept) * self._slot_bytes

    def find(self, key: str, byte_count: int, now_s: float) -> tuple[Extent, int] | None:
        """Where the object of that size lies: its extent and address.  Pin it before anything else."""
        extent = self._where.get(key)
        if extent is None or now_s - extent.read_s > self._keep_s:
            return None
        address, size = extent.objects[key]
        return (extent, address) if size == byte_count else None

    def take(self, byte_count: int) -> Extent | None:
        """Memory for one read, pinned once; None while there is not so much in one piece."""
        count = slots_for(byte_count, self._slot_bytes)
        while (first := self._slots.take(count)) is None:
            if not self._kept:
                return None
            oldest, _ = self._kept.popitem(last=False)
            self._let_go(oldest)
        return Extent(self.address + first * self._slot_bytes, first, count)

    def hold(self, extent: Extent, objects: Iterable[tuple[str, int, int]], now_s: float) -> None:
        """`(key, address, bytes)` of what a read has brought whole: it can be found from now on."""
        extent.read_s = now_s
        for key, address, byte_count in objects:
            before = self._where.get(key)
            if before is not None:
                before.objects.pop(key, None)
            self._where[key] = extent
            extent.objects[key] = address, byte_count

    def pin(self, extent: Extent) -> None:
        extent.pins += 1
        self._kept.pop(extent, None)

    def unpin(self, extent: Extent) -> None:
        extent.pins -= 1
        if extent.pins:
            return
        if extent.objects:
            self._kept[extent] = None
        else:
            self._let_go(extent)

    def _let_go(self, extent: Extent) -> None:
        for key in extent.objects:
            del self._where[key]
        extent.objects.clear()
        self._slots.give_back(extent.first, extent.count)
