"""Bounce memory: what relays send is pulled into it, and copied out when the relay has confirmed it."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Sequence
from typing import NamedTuple

from dualpath_sgl.lanes.forward import Forwarder, StillWriting, merge_runs
from dualpath_sgl.relay.memory import Memory
from dualpath_sgl.relay.slots import Slots, slots_for

logger = logging.getLogger(__name__)

SLOT_BYTES = 256 * 1024
"""As small as the smallest batch."""
MOST_SHARE = 4
"""The largest object takes this part of the memory."""


class Room(NamedTuple):
    address: int
    first_slot: int
    slots: int


class Bounce:
    """One rank's, for all its lanes: any thread.  It takes memory of the host when it is first needed."""

    def __init__(self, byte_count: int) -> None:
        self.byte_count = byte_count
        self._memory: Memory | None = None
        self._slots = Slots(byte_count // SLOT_BYTES)
        self._kept_back: list[tuple[StillWriting, Room]] = []
        self._lock = threading.Lock()
        self.most_bytes = byte_count // MOST_SHARE

    def register_with(self, forwarder: Forwarder) -> None:
        """From now on it reads into this.

        Raises RuntimeError when Mooncake does not register it, OSError without so much memory.
        """
        forwarder.register(self._address(), self.byte_count)

    @property
    def kept_back(self) -> int:
        """Rooms that a transfer may still write into, which nobody waits for."""
        return len(self._kept_back)

    def take(self, byte_count: int) -> Room | None:
        """None while there is not so much in one piece.  Raises OSError without so much memory."""
        address = self._address()
        count = slots_for(byte_count, SLOT_BYTES)
        with self._lock:
            first = self._slots.take(count)
        return None if first is None else Room(address + first * SLOT_BYTES, first, count)

    def _address(self) -> int:
        with self._lock:
            if self._memory is None:
                self._memory = Memory(self.byte_count)
            return self._memory.address

    def give_back(self, room: Room) -> None:
        """Nothing writes into it, and nobody reads it."""
        with self._lock:
            self._slots.give_back(room.first_slot, room.slots)

    def keep_back(self, room: Room, writing: StillWriting) -> None:
        """Until the transfer is over."""
        with self._lock:
            self._kept_back.append((writing, room))

    def settle(self) -> None:
        """Free what transfers have ended in meanwhile; call it now and then."""
        if not self._kept_back:
            return
        with self._lock:
            over = [(writing, room) for writing, room in self._kept_back if writing.over()]
            for kept in over:
                self._kept_back.remove(kept)
                self._slots.give_back(kept[1].first_slot, kept[1].slots)
        if over:
            logger.info("DualPath: %d pulls that hung are over, their memory is free again", len(over))


def copy_blocks(targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int]) -> None:
    """Other threads run meanwhile."""
    for target, source, size in zip(*merge_runs(targets, sources, sizes), strict=True):
        ctypes.memmove(target, source, size)
