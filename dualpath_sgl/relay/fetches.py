"""Fetches that have begun: each of their objects lies in the ring, or a read is bringing it.

An object that lies there, or is on its way for somebody else, is not read again.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

from dualpath_sgl.relay.fair_queue import Asked
from dualpath_sgl.relay.leases import LeaseName
from dualpath_sgl.relay.metrics import Metrics
from dualpath_sgl.relay.readers import FAILED, Read, Readers
from dualpath_sgl.relay.ring import Extent, Ring
from dualpath_sgl.relay.wire import Fetch


@dataclass(eq=False)
class Begun:
    asked: Asked
    addresses: list[int]
    got: list[int]
    extents: list[Extent] = field(default_factory=list)
    """Each pinned once for it."""
    waits_for: dict[Read, list[tuple[int, int]]] = field(default_factory=dict)
    """By read, `(own index, index in the read)` of the objects that it brings."""
    abandoned: bool = False
    """The client wants it no more, or is gone."""

    @property
    def name(self) -> LeaseName:
        return self.asked.client, self.asked.fetch.lease

    @property
    def got_bytes(self) -> int:
        return sum(count for count in self.got if count > 0)


class Fetches:
    """For one thread."""

    def __init__(self, ring: Ring, readers: Readers, metrics: Metrics) -> None:
        self._ring = ring
        self._readers = readers
        self._metrics = metrics
        self._begun: dict[LeaseName, Begun] = {}
        self._reading: dict[str, Read] = {}
        """By key, the read that will bring it."""
        self._waiting: dict[Read, list[Begun]] = {}

    def __len__(self) -> int:
        return len(self._begun)

    def __contains__(self, name: LeaseName) -> bool:
        return name in self._begun

    def clients(self) -> set[bytes]:
        return {client for client, _ in self._begun}

    def need_no_read(self, fetch: Fetch) -> bool:
        """Every object lies in the ring, or is on its way there."""
        now_s = time.monotonic()
        return all(
            self._ring.find(key, size, now_s) is not None or self._on_its_way(key, size) is not None
            for key, size in zip(fetch.keys, fetch.sizes, strict=True)
        )

    def begin(self, asked: Asked) -> Begun | None:
        """Find, wait for, or read each object; None while the ring has no memory for what must be read.

        Needs an idle reader unless `need_no_read`.
        """
        fetch, now_s = asked.fetch, time.monotonic()
        begun = Begun(asked, [0] * len(fetch.keys), [FAILED] * len(fetch.keys))
        pinned: Counter[Extent] = Counter()
        missing: list[int] = []
        kept_bytes = 0
        for index, (key, size) in enumerate(zip(fetch.keys, fetch.sizes, strict=True)):
            if (found := self._ring.find(key, size, now_s)) is not None:
                extent, begun.addresses[index] = found
                begun.got[index] = size
            elif (coming := self._on_its_way(key, size)) is not None:
                read, position = coming
                extent, begun.addresses[index] = read.extent, read.addresses[position]
                begun.waits_for.setdefault(read, []).append((index, position))
            else:
                missing.append(index)
                continue
            pinned[extent] += 1
            kept_bytes += size
        for extent in pinned:  # before memory is taken: it could be theirs
            self._ring.pin(extent)
        begun.extents = list(pinned)
        if missing and not self._begin_read(begun, missing):
            self.unpin(begun.extents)
            return None
        self._metrics.kept_bytes.add(kept_bytes)
        self._metrics.wait_seconds.observe(now_s - asked.asked_s)
        self._begun[begun.name] = begun
        for read in begun.waits_for:
            self._waiting[read].append(begun)
        return begun

    def read_ended(self, read: Read) -> list[Begun]:
        """Fetches that wait for nothing any more."""
        self._readers.ended(read)
        self._metrics.read_ended(read)
        self._forget_reading(read)
        results = zip(read.keys, read.addresses, read.sizes, read.got, strict=True)
        whole = [(key, address, size) for key, address, size, got in results if got == size]
        self._ring.hold(read.extent, whole, time.monotonic())
        ready = []
        for begun in self._waiting.pop(read, []):
            for index, position in begun.waits_for.pop(read):
                begun.got[index] = read.got[position]
            if not begun.waits_for:
                ready.append(begun)
        self._ring.unpin(read.extent)
        return ready

    def give_up(self, read: Read) -> list[Begun]:
        """Fetches of which nothing will come: the store hangs.  The memory stays with the read."""
        self._forget_reading(read)
        lost = self._waiting.pop(read, [])
        for begun in lost:
            for other in begun.waits_for:
                if other is not read:
                    self._waiting[other].remove(begun)
            self.end(begun)
            self.unpin(begun.extents)
        return lost

    def end(self, begun: Begun) -> None:
        """It is nobody's business here any more; its extents stay pinned."""
        del self._begun[begun.name]

    def abandon(self, client: bytes, lease: int | None = None) -> None:
        """A client wants one of its fetches no more, or none of them."""
        for name, begun in self._begun.items():
            if name[0] == client and lease in (None, name[1]):
                begun.abandoned = True

    def unpin(self, extents: list[Extent]) -> None:
        for extent in extents:
            self._ring.unpin(extent)

    def _on_its_way(self, key: str, size: int) -> tuple[Read, int] | None:
        read = self._reading.get(key)
        if read is None:
            return None
        index = read.keys.index(key)
        return (read, index) if read.sizes[index] == size else None

    def _begin_read(self, begun: Begun, missing: list[int]) -> bool:
        fetch = begun.asked.fetch
        extent = self._ring.take(sum(fetch.sizes[index] for index in missing))
        if extent is None:
            return False
        read, address = Read(extent, [], [], []), extent.address
        for position, index in enumerate(missing):
            read.keys.append(fetch.keys[index])
            read.sizes.append(fetch.sizes[index])
            read.addresses.append(address)
            begun.addresses[index] = address
            begun.waits_for.setdefault(read, []).append((index, position))
            self._reading[fetch.keys[index]] = read
            address += fetch.sizes[index]
        self._ring.pin(extent)  # for the fetch; the read has its own pin
        begun.extents.append(extent)
        self._waiting[read] = []
        self._readers.begin(read)
        return True

    def _forget_reading(self, read: Read) -> None:
        for key in read.keys:
            if self._reading.get(key) is read:
                del self._reading[key]
