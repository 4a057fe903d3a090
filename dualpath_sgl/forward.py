"""One-sided reads of KV pages out of another engine's host pool (Mooncake transfer engine).

This engine is an instance of its own, apart from the store's client and from SGLang's PD
transfer: it belongs to the compute network.
"""

from __future__ import annotations

from typing import Sequence

import torch


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
        for buffer in buffers:
            code = self._engine.register_memory(buffer.data_ptr(), buffer.numel() * buffer.element_size())
            if code != 0:
                raise RuntimeError(f"Mooncake refused to register the KV host pool: code {code}")
        # P2PHANDSHAKE picks its own port: peers must be told on every start.
        self.session = f"{host}:{self._engine.get_rpc_port()}"

    def read(
        self, session: str, local: Sequence[int], remote: Sequence[int], lengths: Sequence[int]
    ) -> bool:
        """Copy `lengths[i]` bytes from `remote[i]` in `session` to `local[i]`; True if all arrived.

        Every block costs time whatever its size: join them first (`merge_runs`).
        """
        return self._engine.batch_transfer_sync_read(session, local, remote, lengths) == 0


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
