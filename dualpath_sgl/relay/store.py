"""The relay's client of Mooncake Store, on the storage network."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from dualpath_sgl.limits.read_limit import ReadLimit
from dualpath_sgl.relay.settings import Settings

if TYPE_CHECKING:
    from dualpath_sgl.relay.memory import Memory

LOCAL_BUFFER_BYTES = 16 << 20
"""Mooncake wants one; reads here go into the ring."""


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

        self._store = MooncakeDistributedStore()
        tenant = {} if settings.tenant_id == "default" else {"tenant_id": settings.tenant_id}
        code = self._store.setup(
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
        code = self._store.register_buffer(memory.address, memory.byte_count)
        if code != 0:
            raise StoreRefused(
                f"Mooncake store did not register {memory.byte_count} bytes of ring: code {code}"
            )

    def read(self, keys: list[str], addresses: list[int], sizes: list[int]) -> list[int]:
        got: list[int] = self._store.batch_get_into(keys, addresses, sizes)
        return got


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
