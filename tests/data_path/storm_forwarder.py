"""A forwarding engine whose reads meet what links and peers do, drawn by chance.

Mooncake's engine does the good ones.  A read that fails while its transfers go on writing cannot be ordered
from it, so that one is acted: some blocks arrive, the read says that it is not over, and later something else
is written into the blocks that had not arrived.
"""

from __future__ import annotations

import ctypes
import math
import random
import threading
import time
from typing import ClassVar

from dualpath_sgl.lanes import forward
from dualpath_sgl.lanes.forward import Forwarder

GARBAGE = 0xEE
"""Every byte of what a late transfer writes."""
PAUSES_S = (0.01, 0.3)
WRITES_LATER_S = (0.02, 0.3)
FATES = ("well",) * 11 + ("pauses", "pauses", "pauses", "refused", "writes later")


class StormForwarder(Forwarder):
    chance = random.Random(0)
    """One for the process: the storm's seed decides."""
    late_writes: ClassVar[list[LateWrites]] = []

    def read(self, mooncake_address, local, remote, lengths, patience_s=math.inf) -> bool:
        fate = self.chance.choice(FATES)
        if fate == "refused":
            return False
        if fate == "writes later":
            half = len(local) // 2
            if half and not super().read(
                mooncake_address, local[:half], remote[:half], lengths[:half], patience_s
            ):
                return False
            late = LateWrites(local[half:], lengths[half:], self.chance.uniform(*WRITES_LATER_S))
            self.late_writes.append(late)
            raise forward.StillWriting(late)
        if fate == "pauses":
            time.sleep(self.chance.uniform(*PAUSES_S))
        return super().read(mooncake_address, local, remote, lengths, patience_s)


class LateWrites:
    """Transfers of a read that was given up: they write once more, then they are over."""

    def __init__(self, local: list[int], lengths: list[int], after_s: float) -> None:
        self._blocks = list(zip(local, lengths, strict=True))
        self._over = False
        threading.Timer(after_s, self._write).start()

    def __len__(self) -> int:
        return 0 if self._over else len(self._blocks)

    def settle(self) -> bool:
        return self._over

    def _write(self) -> None:
        for pointer, length in self._blocks:
            ctypes.memset(pointer, GARBAGE, length)
        self._over = True
