"""A batch: what one relay has claimed of a load, on its way through bounce memory to its places."""

from __future__ import annotations

from dataclasses import dataclass

from dualpath_sgl.lanes.forward import merge_runs
from dualpath_sgl.relay.client.claims import Claim, Load
from dualpath_sgl.relay.client.memory.bounce import Room, copy_blocks
from dualpath_sgl.relay.wire import NOT_HELD, Fetch, Ready


@dataclass(eq=False)
class Batch:
    lease: int
    load: Load
    claim: Claim
    room: Room
    """As large as the claim; object follows on object."""
    since_s: float
    """When the relay was asked, had it ready, or was told to release."""
    ready: Ready | None = None

    def fetch(self, traceparent: str | None) -> Fetch:
        return Fetch(
            lease=self.lease,
            keys=tuple(self.load.keys[index] for index in self.claim.indices),
            sizes=tuple(self.load.sizes[index] for index in self.claim.indices),
            left_bytes=self.load.left_bytes,
            traceparent=traceparent,
        )

    def transfers(self) -> tuple[list[int], list[int], list[int]]:
        """Addresses here and in the relay, and sizes, of what the relay has whole."""
        local: list[int] = []
        remote: list[int] = []
        sizes: list[int] = []
        for index, here, there in self._whole():
            local.append(here)
            remote.append(there)
            sizes.append(self.load.sizes[index])
        return merge_runs(local, remote, sizes)

    def copy(self) -> list[int]:
        """Write what came to its places; the objects that were whole."""
        targets: list[int] = []
        sources: list[int] = []
        sizes: list[int] = []
        whole: list[int] = []
        for index, source, _ in self._whole():
            whole.append(index)
            for address, size in zip(*self.load.destinations[index], strict=True):
                targets.append(address)
                sources.append(source)
                sizes.append(size)
                source += size
        copy_blocks(targets, sources, sizes)
        return whole

    def not_held(self) -> list[int]:
        """Objects that others may have."""
        assert self.ready is not None
        results = zip(self.claim.indices, self.ready.got, strict=True)
        return [index for index, got in results if got == NOT_HELD]

    def _whole(self) -> list[tuple[int, int, int]]:
        """Index, address in the room and address in the relay of each object that has the size asked for."""
        assert self.ready is not None
        whole: list[tuple[int, int, int]] = []
        here = self.room.address
        for index, there, got in zip(self.claim.indices, self.ready.addresses, self.ready.got, strict=True):
            size = self.load.sizes[index]
            if got == size:
                whole.append((index, here, there))
            here += size
        return whole
