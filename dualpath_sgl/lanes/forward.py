"""One-sided reads of KV pages out of another engine's host pool (Mooncake transfer engine).

This engine is an instance of its own, apart from the store's client and from SGLang's PD
transfer: it belongs to the compute network.

Memory belongs to a read until nothing can be written into it any more.  Mooncake's own synchronous
read returns at the first failed block, or after 30 s, while other blocks go on writing.  So every
block is a transfer of its own here, few are under way at a time, and each is followed to its end.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from mooncake.engine import TransferEngine

LEAST_PIECE_BYTES = 64 * 1024
MOST_PIECE_BYTES = 16 * 1024 * 1024
PIECE_S = 0.005
"""A read is cut into transfers that take the peer about so long, within these sizes.  On a slow link they are
short, so that one of them ends every now and then while the peer is alive.  On a fast one they are few: each waits
for the interpreter, which an engine's own loop keeps busy."""
UNKNOWN_RATE = 100e6
"""Bytes a second that are expected of a peer before it was read from."""
UNDER_WAY = 12
"""Transfers: three for each of the four connections that Mooncake makes to a peer.  At a peer that hangs they
end in three rounds of `MC_TCP_PROGRESS_TIMEOUT_SEC` and one second."""
POLL_S = 0.0002
"""Between two looks, or an eighth of what a transfer should take.  Sleeping between looks leaves the core to Mooncake's own thread, which does the copying: on two cores a
read of 256 blocks of 64 KiB takes 10 ms instead of the 17 ms of Mooncake's spinning wait."""

MOST_POLL_S = 0.005

STOOD_STILL_S = 0.1
"""After so long a sleep this process itself stood still, and is no measure for anybody else's patience."""

PROGRESS_S = 10
"""A connection on which nothing has moved for so long is dropped."""

ARRIVED, FAILED = 1, -1


def bound_mooncakes_patience() -> None:
    """Once, before there are other threads: what Mooncake, left to itself, would wait 30 s for, lasts 10.

    Until then memory that a hung peer may still write into is nobody's, and a flush waits for it.
    """
    os.environ.setdefault("MC_TCP_PROGRESS_TIMEOUT_SEC", str(PROGRESS_S))


class StillWriting(Exception):
    """A read was given up, and Mooncake may still write into its memory.

    Whoever lent the memory keeps it until `over()` says that nothing is under way any more.
    """

    def __init__(self, transfers: _Transfers) -> None:
        super().__init__(f"{len(transfers)} transfers are not over")
        self._transfers = transfers

    def over(self) -> bool:
        """Asks Mooncake, never waits."""
        self._transfers.settle()
        return not self._transfers


class Forwarder:
    def __init__(self, host: str, protocol: str, device: str, buffers: Sequence[torch.Tensor]) -> None:
        """Register `buffers` once; they may then be read by peers and read into.

        Raises RuntimeError naming the step and Mooncake's code.
        """
        from mooncake.engine import TransferEngine

        self._engine = TransferEngine()
        code = self._engine.initialize(host, "P2PHANDSHAKE", protocol, device)
        if code != 0:
            raise RuntimeError(
                f"Mooncake transfer engine did not start on {host} ({protocol}, device {device!r}): "
                f"code {code}; check DUALPATH_HOST, DUALPATH_PROTOCOL and DUALPATH_DEVICE"
            )
        self._rates: dict[str, float] = {}
        """Bytes a second of the last read from each engine."""
        for buffer in buffers:
            self.register(buffer.data_ptr(), buffer.numel() * buffer.element_size())
        # P2PHANDSHAKE picks its own port: peers must be told on every start.
        self.mooncake_address = f"{host}:{self._engine.get_rpc_port()}"

    def register(self, address: int, byte_count: int) -> None:
        """As `buffers` of the constructor.  Raises RuntimeError."""
        code = self._engine.register_memory(address, byte_count)
        if code != 0:
            raise RuntimeError(f"Mooncake refused to register the KV host pool: code {code}")

    def answers(self, mooncake_address: str) -> bool:
        """Whether the engine at `mooncake_address` lives.  Waits up to 60 s for one that hangs.

        Ask before the first read from an engine: Mooncake makes its first contact inside that read and
        under a lock, where an engine that hangs stops the reads from all others for as long.
        """
        return self._engine.send_probe(mooncake_address) == 0

    def read(
        self,
        mooncake_address: str,
        local: Sequence[int],
        remote: Sequence[int],
        lengths: Sequence[int],
        patience_s: float = math.inf,
        most_s: float = math.inf,
    ) -> bool:
        """Copy `lengths[i]` bytes from `remote[i]` at that engine to `local[i]`; True if all arrived.

        Once it has returned, nothing writes into `local`.  Raises StillWriting when no transfer has
        ended for `patience_s`, or the whole takes longer than `most_s`.  Every block costs time whatever
        its size: join them first (`merge_runs`).
        """
        begun_s = time.monotonic()
        rate = self._rates.pop(mooncake_address, UNKNOWN_RATE)
        piece_bytes = _piece_bytes(sum(lengths), rate)
        transfers = _Transfers(self._engine, begun_s + most_s, max(POLL_S, piece_bytes / rate / 8))
        try:
            for piece in _pieces(local, remote, lengths, piece_bytes):
                transfers.wait_for_room(UNDER_WAY, patience_s)
                if transfers.failed:
                    break
                transfers.start(mooncake_address, *piece)
            transfers.wait_for_room(1, patience_s)
        except Exception as error:
            if not transfers:
                raise
            raise StillWriting(transfers) from error
        if not transfers.failed:
            self._rates[mooncake_address] = max(1.0, sum(lengths) / (time.monotonic() - begun_s + 1e-9))
        return not transfers.failed


class _Transfers:
    """What Mooncake was asked for in one read and has not ended yet, oldest first."""

    def __init__(self, engine: TransferEngine, until_s: float, poll_s: float) -> None:
        self._engine = engine
        self._poll_s = min(poll_s, MOST_POLL_S)
        self._until_s = until_s
        self._batches: deque[int] = deque()
        self.failed = False

    def __len__(self) -> int:
        return len(self._batches)

    def start(self, mooncake_address: str, local: int, remote: int, length: int) -> None:
        batch = self._engine.batch_transfer_async_read(mooncake_address, [local], [remote], [length])
        # Asking for the state of a batch that was refused (0, or -1 without its sign) ends the process.
        if 0 < batch < 2**63:
            self._batches.append(batch)
        else:
            self.failed = True

    def wait_for_room(self, most: int, patience_s: float) -> None:
        """Until fewer than `most` are under way.

        Raises TimeoutError when none ends for `patience_s`, or they do not end in time.
        """
        self.settle()
        waits_since_s = time.monotonic()
        while len(self._batches) >= most:
            begun_s = time.monotonic()
            time.sleep(self._poll_s)
            slept_s = time.monotonic() - begun_s
            if slept_s > STOOD_STILL_S:
                waits_since_s += slept_s
                self._until_s += slept_s
            if self.settle():
                waits_since_s = time.monotonic()
            elif time.monotonic() - waits_since_s > patience_s:
                raise TimeoutError(f"no transfer has ended for {patience_s:g} s")
            if time.monotonic() > self._until_s and len(self._batches) >= most:
                raise TimeoutError("it takes too long")

    def settle(self) -> bool:
        """Forget the oldest as far as they have ended; whether one had."""
        before = len(self._batches)
        while self._batches:
            status = self._engine.transfer_check_status(self._batches[0])
            if status not in (ARRIVED, FAILED):  # under way; a time-out of Mooncake's is no end either
                break
            self._batches.popleft()  # Mooncake has freed it
            self.failed |= status == FAILED
        return len(self._batches) < before


def _piece_bytes(total_bytes: int, bytes_per_s: float) -> int:
    """Of a transfer; enough of them that all connections have one."""
    most = min(MOST_PIECE_BYTES, total_bytes // UNDER_WAY)
    return max(LEAST_PIECE_BYTES, min(most, int(bytes_per_s * PIECE_S)))


def _pieces(
    local: Sequence[int], remote: Sequence[int], lengths: Sequence[int], most: int
) -> Iterator[tuple[int, int, int]]:
    """`(local, remote, length)` of every transfer that the blocks are cut into."""
    for here, there, length in zip(local, remote, lengths, strict=True):
        for offset in range(0, length, most):
            yield here + offset, there + offset, min(most, length - offset)


def merge_runs(
    local: Sequence[int], remote: Sequence[int], lengths: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """Join blocks that lie next to each other on both sides, in any order of the input.

    Mooncake pays about 30 us for a block whatever its size and does not merge by itself.
    """
    merged_local: list[int] = []
    merged_remote: list[int] = []
    merged_lengths: list[int] = []
    for here, there, length in sorted(zip(local, remote, lengths, strict=True)):
        if (
            merged_local
            and merged_local[-1] + merged_lengths[-1] == here
            and merged_remote[-1] + merged_lengths[-1] == there
        ):
            merged_lengths[-1] += length
        else:
            merged_local.append(here)
            merged_remote.append(there)
            merged_lengths.append(length)
    return merged_local, merged_remote, merged_lengths
