"""A queue into a thread that sleeps in a ZeroMQ poll."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Any thread may `put`; the owner polls `fd` for reading and then iterates `drain()`."""

    def __init__(self) -> None:
        """Raises OSError when the process has no descriptor left."""
        self._items: SimpleQueue[T] = SimpleQueue()
        self.fd = os.eventfd(0, os.EFD_NONBLOCK)

    def put(self, item: T) -> None:
        self._items.put(item)
        os.eventfd_write(self.fd, 1)

    def drain(self) -> Iterator[T]:
        with suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        while True:
            try:
                yield self._items.get_nowait()
            except Empty:
                return

    @property
    def empty(self) -> bool:
        return self._items.empty()

    def close(self) -> None:
        """Nobody puts anything in any more."""
        os.close(self.fd)
