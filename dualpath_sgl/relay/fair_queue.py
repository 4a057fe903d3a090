"""Whose fetch is read next.

Loads of several prefill engines meet in one relay, which does not know when they should end.  In this order:

1. A fetch that has waited for `patience_s`, the longest waiting first: nobody starves.
2. An engine that has little left beside the others (`SMALL_SHARE` of the most), first come first served:
   it holds them up for little, and would otherwise wait for all of theirs.
3. The engine with the most left: loads of different sizes end together, with every link busy until then.

Within one engine fetches keep their order.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from operator import attrgetter

from dualpath_sgl.relay.wire import Fetch

SMALL_SHARE = 1 / 8


@dataclass(eq=False)
class Asked:
    """A fetch that waits for its turn."""

    client: bytes
    engine: str
    fetch: Fetch
    asked_s: float


class FairQueue:
    """For one thread."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._engines: dict[str, deque[Asked]] = {}
        self._names: dict[tuple[bytes, int], Asked] = {}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: tuple[bytes, int]) -> bool:
        return name in self._names

    def put(self, asked: Asked) -> None:
        self._engines.setdefault(asked.engine, deque()).append(asked)
        self._names[asked.client, asked.fetch.lease] = asked
        self.bytes += sum(asked.fetch.sizes)

    def first(self, now_s: float) -> Asked | None:
        """Whose turn it is; stays queued until it is removed."""
        if not self._engines:
            return None
        heads = sorted((waiting[0] for waiting in self._engines.values()), key=attrgetter("asked_s"))
        if now_s - heads[0].asked_s > self._patience_s:
            return heads[0]
        left = {asked.engine: self._left(asked.engine) for asked in heads}
        most = max(heads, key=lambda asked: left[asked.engine])
        small = left[most.engine] * SMALL_SHARE
        return next((asked for asked in heads if left[asked.engine] <= small), most)

    def remove(self, client: bytes, lease: int) -> Asked | None:
        """None when it does not wait here."""
        asked = self._names.pop((client, lease), None)
        if asked is not None:
            waiting = self._engines[asked.engine]
            waiting.remove(asked)
            if not waiting:
                del self._engines[asked.engine]
            self.bytes -= sum(asked.fetch.sizes)
        return asked

    def of(self, client: bytes) -> list[int]:
        """The leases of one client."""
        return [lease for other, lease in self._names if other == client]

    def clients(self) -> set[bytes]:
        return {client for client, _ in self._names}

    def _left(self, engine: str) -> int:
        """Bytes: what its ranks say is left, each by its latest word, and what of theirs waits here."""
        waiting = self._engines[engine]
        left = {asked.client: asked.fetch.left_bytes for asked in waiting}
        return sum(left.values()) + sum(sum(asked.fetch.sizes) for asked in waiting)
