"""The relays of a cluster: what each is called, where it lives, and what it is given.

Pure: nothing is started or read here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dualpath_sgl.launch.config import security
from dualpath_sgl.launch.config.addresses import Addresses
from dualpath_sgl.launch.config.cluster import ClusterConfig, bits_per_s
from scheduler_svc.wire.addresses import authority
from scheduler_svc.wire.protocol import Role

CPU_RING_BYTES = 256 << 20
"""Links between processes of one machine are slow, and its memory is small."""


@dataclass(frozen=True)
class RelaySpec:
    """One relay."""

    name: str
    host: str
    """Whose links it uses: a decode engine's name, or its own."""
    port: int
    metrics_port: int

    def endpoint(self, addresses: Addresses) -> str:
        return f"tcp://{authority(addresses.engine(self.host).url_host, self.port)}"

    def metrics_url(self, addresses: Addresses) -> str:
        return f"http://{authority(addresses.engine(self.host).url_host, self.metrics_port)}/metrics"


def relay_specs(config: ClusterConfig, take_port: Callable[[], int]) -> list[RelaySpec]:
    """One beside each decode engine, more on hosts of their own; `config.mode` is chosen."""
    return [
        RelaySpec(
            name,
            f"{Role.DECODE}-{index}" if index < config.decode.count else name,
            take_port(),
            take_port(),
        )
        for index, name in enumerate(config.relay_names)
    ]


def relay_command() -> list[str]:
    return [sys.executable, "-m", "dualpath_sgl.relay"]


def relay_environment(
    config: ClusterConfig,
    addresses: Addresses,
    relay: RelaySpec,
    master: str,
    collector: str,
    scheduler: str,
    base: Mapping[str, str],
) -> dict[str, str]:
    """`master`: HOST:PORT of the store's; `collector`, `scheduler`: URLs of them; `base`: a part's environment."""
    own = addresses.engine(relay.host)
    environment = {
        **base,
        "MC_LOG_LEVEL": "ERROR",
        "DUALPATH_RELAY_NAME": relay.name,
        "DUALPATH_RELAY_HOST": own.compute,
        "DUALPATH_RELAY_PORT": str(relay.port),
        "DUALPATH_RELAY_METRICS_PORT": str(relay.metrics_port),
        "DUALPATH_RELAY_PROTOCOL": config.transport.compute,
        "DUALPATH_RELAY_STORAGE_HOST": own.storage,
        "DUALPATH_RELAY_STORAGE_PROTOCOL": config.transport.storage,
        "DUALPATH_RELAY_MASTER": master,
        "DUALPATH_RELAY_SCHEDULER": scheduler,
        **security.relay_environment(config.security, addresses, relay.name),
    }
    if own.compute_device:
        environment["DUALPATH_RELAY_DEVICE"] = own.compute_device
    if own.storage_device:
        environment["DUALPATH_RELAY_STORAGE_DEVICE"] = own.storage_device
    if config.store.read_rate is not None:
        environment["DUALPATH_RELAY_READ_RATE_BYTES_PER_S"] = str(bits_per_s(config.store.read_rate) // 8)
    if config.tracing.enabled:
        environment["DUALPATH_RELAY_OTLP_ENDPOINT"] = collector
    if config.device == "cpu":
        environment["DUALPATH_RELAY_RING_BYTES"] = str(CPU_RING_BYTES)
    return environment | config.relays.env
