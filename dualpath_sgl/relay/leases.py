"""Leases: until when a client may pull what lies in the ring."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from dualpath_sgl.relay.ring import Extent

LeaseName = tuple[bytes, int]
"""The client's connection, and the number that it chose."""


class _Lease(NamedTuple):
    extents: list[Extent]
    until_s: float


class Leases:
    """All have the same length, so they end in the order in which they began.  For one thread."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._leases: OrderedDict[LeaseName, _Lease] = OrderedDict()

    def __len__(self) -> int:
        return len(self._leases)

    def __contains__(self, name: LeaseName) -> bool:
        return name in self._leases

    def begin(self, name: LeaseName, extents: list[Extent], now_s: float) -> None:
        """The extents are pinned by the caller, once for this lease."""
        self._leases[name] = _Lease(extents, now_s + self._lease_s)

    def end(self, name: LeaseName, now_s: float) -> tuple[bool, list[Extent]]:
        """Whether it was held until now, and what is to be unpinned."""
        lease = self._leases.pop(name, None)
        if lease is None:
            return False, []
        return now_s <= lease.until_s, lease.extents

    def expired(self, now_s: float) -> list[LeaseName]:
        names = []
        for name, lease in self._leases.items():
            if now_s <= lease.until_s:
                break
            names.append(name)
        return names

    def of(self, client: bytes) -> list[LeaseName]:
        return [name for name in self._leases if name[0] == client]
