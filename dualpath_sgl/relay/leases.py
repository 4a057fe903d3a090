"""Leases: until when a client may pull what it was told of."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

LeaseName = tuple[bytes, int]
"""The client's connection, and the number that it chose."""


T = TypeVar("T")


@dataclass(frozen=True)
class _Lease(Generic[T]):
    of: list[T]
    until_s: float


class Leases(Generic[T]):
    """Of fetches that are ready, or places in a host pool.  All have the same length, so they end in the order in which they began.  For one thread."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._leases: OrderedDict[LeaseName, _Lease[T]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._leases)

    def __contains__(self, name: LeaseName) -> bool:
        return name in self._leases

    def begin(self, name: LeaseName, of: list[T], now_s: float) -> None:
        self._leases[name] = _Lease(of, now_s + self._lease_s)

    def end(self, name: LeaseName, now_s: float) -> tuple[bool, list[T]]:
        """Whether it was held until now, and what it was of."""
        lease = self._leases.pop(name, None)
        if lease is None:
            return False, []
        return now_s <= lease.until_s, lease.of

    def expired(self, now_s: float) -> list[LeaseName]:
        names = []
        for name, lease in self._leases.items():
            if now_s <= lease.until_s:
                break
            names.append(name)
        return names

    def of(self, client: bytes) -> list[LeaseName]:
        return [name for name in self._leases if name[0] == client]

    def clients(self) -> set[bytes]:
        return {client for client, _ in self._leases}
