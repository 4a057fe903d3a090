"""The store's memory: a Mooncake client that only owns a segment (`python -m dualpath_sgl.launch.processes.store_node`).

Engines contribute no memory of their own, so an engine that dies takes no stored page with it.
"""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

LOCAL_BUFFER_BYTES = 16 << 20
READY = "store node ready"


def serve(
    master: Annotated[str, typer.Option(help="host:port of mooncake_master.")],
    segment_bytes: Annotated[int, typer.Option(min=1, help="DRAM to contribute.")],
    host: Annotated[str, typer.Option(help="This node's address on the storage network.")] = "127.0.0.1",
    protocol: Annotated[str, typer.Option(help="tcp or rdma.")] = "tcp",
    device: Annotated[str, typer.Option(help="RDMA device, with protocol rdma.")] = "",
) -> None:
    """Contribute a memory segment to the store until SIGTERM or SIGINT."""
    from mooncake.store import MooncakeDistributedStore

    stop_signals = {signal.SIGTERM, signal.SIGINT}
    # Before Mooncake starts its threads, which inherit the mask: the wait below must get the signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)
    store = MooncakeDistributedStore()
    code = store.setup(host, "P2PHANDSHAKE", segment_bytes, LOCAL_BUFFER_BYTES, protocol, device, master)
    if code != 0:
        sys.exit(f"Mooncake store set-up failed with code {code} (-900: no master at {master})")
    print(f"{READY}: {segment_bytes} bytes at {host}", flush=True)
    signal.sigwait(stop_signals)
    store.close()


if __name__ == "__main__":
    typer.run(serve)
