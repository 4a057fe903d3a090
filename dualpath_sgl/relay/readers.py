"""Threads that read from the store, one call at a time each.

A call into Mooncake cannot be taken back and may write into its memory until it returns.  So a read that
takes too long is given up by those who wait for it, never by its memory: the thread stays with it, another
one takes its place, and what it wrote into is free again when it returns.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue

from dualpath_sgl.control.drain_rate import DrainRate
from dualpath_sgl.relay.ring import Extent
from dualpath_sgl.relay.store import Store
from dualpath_sgl.threads.priority import wait_politely

logger = logging.getLogger(__name__)

MOST_HANGING = 8
"""Reads given up and not over; with so many the store is asked for nothing more."""
LEAST_RATE_BYTES_PER_S = 4e6
"""A store this slow is slow, and no store that hangs."""
FAILED = -1
"""Result of every object when the call itself failed."""


@dataclass(eq=False)
class Read:
    extent: Extent
    keys: list[str]
    addresses: list[int]
    sizes: list[int]
    begun_s: float = 0.0
    ended_s: float = 0.0
    begun_ns: int = 0
    got: list[int] = field(default_factory=list)
    error: Exception | None = None
    given_up: bool = False
    replaced: bool = False
    """Another thread has taken its thread's place."""

    @property
    def byte_count(self) -> int:
        return sum(self.sizes)

    @property
    def got_bytes(self) -> int:
        return sum(count for count in self.got if count > 0)


class Readers:
    """For one thread, but for what its own threads do."""

    def __init__(self, store: Store, count: int, hang_s: float, on_end: Callable[[Read], None]) -> None:
        """`on_end` is called on a reader's thread when a read is over, given up or not."""
        self._store = store
        self._hang_s = hang_s
        self._on_end = on_end
        self._reads: SimpleQueue[Read | None] = SimpleQueue()
        self._under_way: set[Read] = set()
        self._hanging = 0
        self.rate = DrainRate()
        self.read_bytes = 0
        self.idle = count
        for _ in range(count):
            self._start_thread()

    @property
    def hanging(self) -> int:
        """Reads that were given up and are not over."""
        return self._hanging

    @property
    def store_hangs(self) -> bool:
        """No reader is left, and none takes the place of those that hang."""
        return self._hanging >= MOST_HANGING

    @property
    def bytes_under_way(self) -> int:
        return sum(read.byte_count for read in self._under_way)

    @property
    def under_way(self) -> int:
        """Reads that have begun and are neither over nor given up."""
        return len(self._under_way)

    def begin(self, read: Read) -> None:
        """Call it when `idle`."""
        self.idle -= 1
        read.begun_s, read.begun_ns = time.monotonic(), time.time_ns()
        self.rate.begin()
        self._under_way.add(read)
        self._reads.put(read)

    def ended(self, read: Read) -> None:
        """A read that `on_end` was told of."""
        self._under_way.discard(read)
        self.read_bytes += read.got_bytes
        if read.given_up:
            self._hanging -= 1
        else:
            self.rate.end(read.got_bytes)
        if read.replaced:
            self._reads.put(None)
        else:
            self.idle += 1

    def give_up_overdue(self, now_s: float) -> list[Read]:
        """Reads that hang, each once; other threads take their places."""
        overdue = [
            read
            for read in self._under_way
            if now_s > read.begun_s + self._hang_s + read.byte_count / LEAST_RATE_BYTES_PER_S
        ]
        for read in overdue:
            self._under_way.discard(read)
            read.given_up = True
            self.rate.end(0)
            self._hanging += 1
            if not self.store_hangs:
                read.replaced = True
                self._start_thread()
                self.idle += 1
        return overdue

    def _start_thread(self) -> None:
        threading.Thread(target=self._run, name="dualpath-relay-reader", daemon=True).start()

    def _run(self) -> None:
        wait_politely()
        while (read := self._reads.get()) is not None:
            try:
                read.got = list(self._store.read(read.keys, read.addresses, read.sizes))
                if len(read.got) != len(read.keys):
                    raise ValueError(f"{len(read.got)} results for {len(read.keys)} objects")
            except Exception as error:
                read.error = error
                read.got = [FAILED] * len(read.keys)
            read.ended_s = time.monotonic()
            self._on_end(read)
