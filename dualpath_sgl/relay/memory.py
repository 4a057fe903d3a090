"""Memory for transfers: one piece, mapped once, all of it present."""

from __future__ import annotations

import ctypes
import mmap
import os
from contextlib import suppress
from pathlib import Path

NODE = "/sys/devices/system/node/node{node}/cpulist"


class Memory:
    def __init__(self, byte_count: int) -> None:
        """Zeros, on the NUMA node of the calling thread.  Raises OSError when there is not so much."""
        self._map = mmap.mmap(-1, byte_count)
        self.byte_count = byte_count
        with suppress(OSError, AttributeError):  # a kernel without huge pages
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        # Touched here, or its pages would come from the node of whoever writes first.
        ctypes.memset(self.address, 0, byte_count)


def stay_on_node(node: int) -> None:
    """Run this process on the cores of one NUMA node; memory that it touches is taken there.

    Raises ValueError when the host has no such node.
    """
    try:
        cores = parse_cores(Path(NODE.format(node=node)).read_text())
    except OSError:
        raise ValueError(f"there is no NUMA node {node} on this host; see `lscpu`") from None
    os.sched_setaffinity(0, cores)


def parse_cores(text: str) -> set[int]:
    """The kernel's list of cores, `0-3,8`.  Raises ValueError."""
    cores: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return cores
