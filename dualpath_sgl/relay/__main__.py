"""`python -m dualpath_sgl.relay`: a relay as a process, configured by `DUALPATH_RELAY_*`."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable

from dualpath_sgl.control.relay_channel import RelayChannel
from dualpath_sgl.lanes.door import BindRefused
from dualpath_sgl.lanes.forward import Forwarder, bound_mooncakes_patience
from dualpath_sgl.lanes.peer_keys import PeerKeys
from dualpath_sgl.limits.read_limit import ReadLimit
from dualpath_sgl.relay.memory import Memory, stay_on_node
from dualpath_sgl.relay.metrics import Metrics
from dualpath_sgl.relay.ring import Ring
from dualpath_sgl.relay.server import Server
from dualpath_sgl.relay.settings import Settings, load
from dualpath_sgl.relay.store import LimitedReads, MooncakeReads, PolledReads, Store, StoreRefused
from scheduler_svc.telemetry.tracing import init_tracing, shutdown
from scheduler_svc.wire.descriptors import allow_many_connections
from scheduler_svc.wire.keys import KeyFileError
from scheduler_svc.wire.protocol import RelayInfo
from scheduler_svc.wire.reach import is_loopback

logger = logging.getLogger(__name__)

READY = "relay ready at"


def serve(settings: Settings, on_store: Callable[[Store], Store] = lambda store: store) -> None:
    """Serve until SIGTERM or SIGINT, then drain.  `on_store` may put something before the store's client.

    Raises what `main` turns into words.
    """
    bound_mooncakes_patience()
    if settings.numa_node is not None:
        stay_on_node(settings.numa_node)
    allow_many_connections()
    memory = Memory(settings.ring_bytes)
    store = _reads(settings, memory)
    if settings.read_rate_bytes_per_s is not None:
        store = LimitedReads(store, ReadLimit(settings.read_rate_bytes_per_s))
    transfers = Forwarder(settings.host, settings.protocol, settings.device, [])
    transfers.register(memory.address, memory.byte_count)
    metrics = Metrics()
    server = Server(
        settings,
        on_store(store),
        transfers.mooncake_address,
        Ring(memory.address, memory.byte_count, settings.slot_bytes, settings.keep_s),
        metrics,
        init_tracing("dualpath-relay", settings.otlp_endpoint, {"dualpath.relay": settings.name})
        if settings.otlp_endpoint
        else None,
        PeerKeys(settings.key_file, settings.peer_keys) if settings.key_file and settings.peer_keys else None,
    )
    if settings.metrics_port is not None:
        host = "127.0.0.1" if is_loopback(settings.host) else "0.0.0.0"
        logger.info("metrics on port %d", metrics.serve(settings.metrics_port, host))
    channel = _channel(settings, server)

    def drain(*_: object) -> None:
        server.stop()
        if channel is not None:
            channel.tell()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, drain)
    if channel is not None:
        channel.start()
    print(f"{READY} {server.endpoint}", flush=True)
    try:
        server.run()
    finally:
        shutdown()


def _channel(settings: Settings, server: Server) -> RelayChannel | None:
    if settings.scheduler is None:
        return None
    key_files = None
    if settings.key_file is not None and settings.scheduler_key_file is not None:
        key_files = settings.key_file, settings.scheduler_key_file
    relay = RelayInfo(name=settings.name, endpoint=server.endpoint, ring_bytes=settings.ring_bytes)
    return RelayChannel(settings.scheduler, relay, server.load, key_files)


def _reads(settings: Settings, memory: Memory) -> Store:
    """Mooncake's own where its transports are fast, or found by other means than their addresses."""
    store = MooncakeReads(settings, memory)
    if settings.storage_protocol != "tcp" or settings.metadata_server != "P2PHANDSHAKE":
        return store
    return PolledReads(store, settings.storage_host or settings.host, memory)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        serve(load())
    except (ValueError, BindRefused, KeyFileError, StoreRefused, RuntimeError, OSError) as error:
        sys.exit(f"relay: {error}")
    # Mooncake's own threads and destructors may wait for peers that are gone; everything of ours is over.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
