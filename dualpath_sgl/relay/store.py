"""The relay's client of Mooncake Store, on the storage network."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple, Protocol

from dualpath_sgl.lanes.forward import Forwarder, merge_runs
from dualpath_sgl.limits.read_limit import ReadLimit
from dualpath_sgl.relay.settings import Settings

if TYPE_CHECKING:
    from mooncake.store import ReplicaDescriptor

    from dualpath_sgl.relay.memory import Memory

LOCAL_BUFFER_BYTES = 16 << 20
"""Mooncake wants one; reads here go into the ring."""
NOT_FOUND = -704
TRANSFER_FAILED = -800
"""Mooncake's codes."""


class StoreRefused(RuntimeError):
    """No client of the store came about; says what to check."""


class Store(Protocol):
    def read(self, keys: list[str], addresses: list[int], sizes: list[int]) -> list[int]:
        """Bytes of each object, written at its address, or a negative code.  May take long."""
        ...


class MooncakeReads:
    def __init__(self, settings: Settings, memory: Memory) -> None:
        """Reads into `memory` from now on.  Raises StoreRefused."""
        from mooncake.store import MooncakeDistributedStore

        self.client = MooncakeDistributedStore()
        tenant = {} if settings.tenant_id == "default" else {"tenant_id": settings.tenant_id}
        code = self.client.setup(
            settings.storage_host or settings.host,
            settings.metadata_server,
            0,
            LOCAL_BUFFER_BYTES,
            settings.storage_protocol,
            settings.storage_device,
            settings.master,
            **tenant,
        )
        if code != 0:
            raise StoreRefused(
                f"Mooncake store at {settings.master}: set-up failed with code {code} (-900: no master "
                "there); check DUALPATH_RELAY_MASTER, _STORAGE_HOST, _STORAGE_PROTOCOL and _STORAGE_DEVICE"
            )
        code = self.client.register_buffer(memory.address, memory.byte_count)
        if code != 0:
            raise StoreRefused(
                f"Mooncake store did not register {memory.byte_count} bytes of ring: code {code}"
            )

    def read(self, keys: list[str], addresses: list[int], sizes: list[int]) -> list[int]:
        got: list[int] = self.client.batch_get_into(keys, addresses, sizes)
        return got


class Place(NamedTuple):
    """An object in the memory of a store node."""

    node: str
    address: int
    byte_count: int


class PolledReads:
    """Reads over TCP that sleep while they wait.

    Mooncake's client of the store waits for a transfer by asking again and again: a core for as long as the link
    takes, which on a slow link is nearly all the time.  Here the master is asked where objects lie, the transfer
    engine is asked for their bytes, and the thread sleeps between looks.

    Mooncake's client trusts a lease: an object that the master has told of is not evicted for a while.  Here the
    master is asked again afterwards: an object counts only if it still lies where it was read.
    """

    def __init__(self, reads: MooncakeReads, host: str, memory: Memory) -> None:
        """Reads into `memory`, on the network of `host`; through `reads` what lies on disk.

        Raises RuntimeError when the transfer engine does not start.
        """
        self._reads = reads
        self._forwarder = Forwarder(host, "tcp", "", [])
        self._forwarder.register(memory.address, memory.byte_count)

    def read(self, keys: list[str], addresses: list[int], sizes: list[int]) -> list[int]:
        """As `Store`.  When it has returned, nothing is written into the addresses any more."""
        got = [NOT_FOUND] * len(keys)
        found = self._replicas(keys)
        places: dict[int, Place] = {}
        elsewhere: list[int] = []
        for index, key in enumerate(keys):
            place = _in_memory(found.get(key, []))
            if place is not None and place.byte_count == sizes[index]:
                places[index] = place
            elif key in found:
                elsewhere.append(index)
        for index, result in zip(places, self._read_places(keys, addresses, places), strict=True):
            got[index] = result
        if elsewhere:
            some = [[values[index] for index in elsewhere] for values in (addresses, sizes)]
            results = self._reads.read([keys[index] for index in elsewhere], *some)
            for index, result in zip(elsewhere, results, strict=True):
                got[index] = result
        return got

    def _read_places(self, keys: list[str], addresses: list[int], places: dict[int, Place]) -> list[int]:
        by_node: dict[str, list[int]] = defaultdict(list)
        for index, place in places.items():
            by_node[place.node].append(index)
        arrived: set[int] = set()
        for node, indices in by_node.items():
            blocks = [
                [addresses[index] for index in indices],
                [places[index].address for index in indices],
                [places[index].byte_count for index in indices],
            ]
            if self._forwarder.read(node, *merge_runs(*blocks)):
                arrived.update(indices)
        after = self._replicas([keys[index] for index in arrived]) if arrived else {}
        return [
            place.byte_count
            if index in arrived and _in_memory(after.get(keys[index], [])) == place
            else TRANSFER_FAILED
            for index, place in places.items()
        ]

    def _replicas(self, keys: list[str]) -> dict[str, list[ReplicaDescriptor]]:
        """Of the objects that there are; of none when the master does not answer."""
        found: dict[str, list[ReplicaDescriptor]] = self._reads.client.batch_get_replica_desc(keys)
        return found


def _in_memory(replicas: list[ReplicaDescriptor]) -> Place | None:
    """The first whole one."""
    from mooncake.store import ReplicaStatus

    for replica in replicas:
        if replica.status == ReplicaStatus.COMPLETE and replica.is_memory_replica():
            buffer = replica.get_memory_descriptor().buffer_descriptor
            return Place(buffer.transport_endpoint, buffer.buffer_address, buffer.size)
    return None


class LimitedReads:
    """A store read no faster than over a link of some rate: for measuring where links cannot be shaped."""

    def __init__(self, store: Store, limit: ReadLimit) -> None:
        self._store = store
        self._limit = limit

    def read(self, keys: list[str], addresses: list[int], sizes: list[int]) -> list[int]:
        begun_s = time.monotonic()
        got = self._store.read(keys, addresses, sizes)
        self._limit.pace(sum(count for count in got if count > 0), begun_s)
        return got
