"""What Mooncake alone carries from one process to another: `python -m dualpath_sgl.evals.load.raw_read`.

`serve` registers memory and prints `<session> <address>`; `read` reads it with
`batch_transfer_sync_read` once for every line of standard input and prints the seconds, one a line.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import signal
import sys
import time
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)

Bytes = Annotated[int, typer.Option("--bytes", min=1, help="Size of one read.")]
Pinned = Annotated[bool, typer.Option("--pinned", help="Register the memory with CUDA too.")]
Host = Annotated[str, typer.Option(help="This side's address.")]


@app.command()
def serve(host: Host, size: Bytes, pinned: Pinned = False) -> None:
    """Offer memory until standard input ends."""
    engine, address = _engine(host, size, pinned)
    print(f"{host}:{engine.get_rpc_port()} {address}", flush=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdin.read()


@app.command()
def read(
    host: Host,
    size: Bytes,
    session: Annotated[str, typer.Option(help="What `serve` printed first.")],
    address: Annotated[int, typer.Option(help="What `serve` printed second.")],
    block_bytes: Annotated[int, typer.Option(min=1, help="Blocks that one call is made of.")] = 1 << 30,
    pinned: Pinned = False,
) -> None:
    """Read the memory that `serve` offers, until standard input ends."""
    engine, local = _engine(host, size, pinned)
    offsets = range(0, size, block_bytes)
    blocks = (
        [local + offset for offset in offsets],
        [address + offset for offset in offsets],
        [min(block_bytes, size - offset) for offset in offsets],
    )
    # The first read connects and does not count.
    for counts in itertools.chain([False], (True for _ in sys.stdin)):
        begun_s = time.perf_counter()
        code = engine.batch_transfer_sync_read(session, *blocks)
        elapsed_s = time.perf_counter() - begun_s
        if code != 0:
            sys.exit(f"read from {session} failed with code {code}")
        if counts:
            print(f"{elapsed_s:.6f}", flush=True)


def _engine(host: str, size: int, pinned: bool):
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    if (code := engine.initialize(host, "P2PHANDSHAKE", "tcp", "")) != 0:
        sys.exit(f"transfer engine did not start on {host}: code {code}")
    memory = mmap.mmap(-1, size)
    memory.write(b"\1" * size)  # Touched, so that no page fault is measured.
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if pinned:
        _pin(address, size)
    if (code := engine.register_memory(address, size)) != 0:
        sys.exit(f"registering {size} bytes failed: code {code}")
    _keep.append(memory)
    return engine, address


def _pin(address: int, size: int) -> None:
    import torch

    if (code := int(torch.cuda.cudart().cudaHostRegister(address, size, 0))) != 0:
        sys.exit(f"pinning {size} bytes failed: CUDA error {code}")


_keep: list[mmap.mmap] = []
"""Mapped until the process ends: Mooncake's threads reach into it."""


if __name__ == "__main__":
    app()
