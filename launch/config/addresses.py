"""Where the parts of a cluster are reached: all on one address, or each on links of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dualpath_sgl.launch.topology.plan import STORE, Plan
from scheduler_svc.wire.reach import is_loopback

STORE_PROCESSES = ("master", "store")
"""Names of the processes that live on the store's machine."""


@dataclass(frozen=True)
class EngineAddresses:
    """One engine."""

    compute: str
    """HTTP, PD transfer, forwarding and page server."""
    storage: str
    """Its store client."""
    compute_nic: str | None
    """Network interface of `compute`; None lets SGLang find it."""
    reached: str | None = None
    """Name that others find it under, where that is not `compute`."""
    compute_device: str = ""
    """RDMA device on the compute network; empty: Mooncake takes all."""
    storage_device: str = ""
    """RDMA device on the storage network, likewise."""

    @property
    def url_host(self) -> str:
        """Where routers and peers reach it."""
        return self.reached or self.compute


@dataclass(frozen=True)
class Addresses:
    """`hub`: router, scheduler, collector and the client.  `store`: master and store nodes."""

    hub: str
    store: str
    engines: Mapping[str, EngineAddresses] = field(default_factory=dict)
    """Addresses of engines that are not at `hub`."""
    parts: Mapping[str, str] = field(default_factory=dict)
    """Addresses of other parts that are neither at `hub` nor at `store`, by name."""
    storage_devices: Mapping[str, str] = field(default_factory=dict)
    """RDMA devices of store nodes, by name."""
    own: str | None = None
    """What every part but an engine listens on, where that is not the address it is reached at."""
    on_this_host_only: bool = False
    """The links were made for this cluster, between namespaces of this machine."""

    def engine(self, name: str) -> EngineAddresses:
        nic = "lo" if is_loopback(self.hub) else None
        return self.engines.get(name, EngineAddresses(self.hub, self.hub, nic))

    def at(self, part: str) -> str:
        """Where others reach it."""
        return self.parts.get(part, self.store if part.startswith(STORE_PROCESSES) else self.hub)

    def listens(self, part: str) -> str:
        """Where it listens itself."""
        return self.own or self.at(part)

    @property
    def every(self) -> list[str]:
        """All addresses of the cluster, each once."""
        own = [address for engine in self.engines.values() for address in (engine.url_host, engine.storage)]
        return list(dict.fromkeys([self.hub, self.store, *self.parts.values(), *own]))


def on_one_host(host: str) -> Addresses:
    return Addresses(hub=host, store=host)


def on_network(plan: Plan) -> Addresses:
    """The addresses of a shaped network's links."""
    computing = [link for link in plan.links if link.kind == "compute"]
    return Addresses(
        hub=plan.host_address("compute"),
        store=plan.link(STORE, "storage").address,
        engines={
            link.member: EngineAddresses(link.address, plan.link(link.member, "storage").address, link.nic)
            for link in computing
        },
        on_this_host_only=True,
    )
