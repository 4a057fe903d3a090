"""The other end of a forward: a process whose memory others may read, that can stop and go on."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

OLD, NEW = 7, 5
"""Every byte of its memory at first, and after `refill`."""

PROGRAM = """
import sys, torch
from dualpath_sgl.lanes.forward import Forwarder
size, old, new = map(int, sys.argv[1:4])
memory = torch.full((size,), old, dtype=torch.uint8)
forwarder = Forwarder("127.0.0.1", "tcp", "", [memory])
print("READY", forwarder.mooncake_address, memory.data_ptr(), flush=True)
for line in sys.stdin:
    memory.fill_(new)
    print("FILLED", flush=True)
"""


class MemoryPeer:
    def __init__(self, size: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(size), str(OLD), str(NEW)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        _, self.mooncake_address, base = self._said("READY").split()
        self.base, self.size = int(base), size

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self, refilled: bool = False) -> None:
        """Goes on; `refilled`: its memory belongs to another prompt by then."""
        if refilled:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        self.process.send_signal(signal.SIGCONT)
        if refilled:
            self._said("FILLED")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def _said(self, word: str) -> str:
        return next(line for line in self.process.stdout if line.startswith(word))


@contextmanager
def memory_peer(size: int) -> Iterator[MemoryPeer]:
    peer = MemoryPeer(size)
    try:
        yield peer
    finally:
        peer.end()
