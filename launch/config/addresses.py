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


@dataclass(frozen=True)
class Addresses:
    """`hub`: router, scheduler, collector and the client.  `store`: master and store node."""

    hub: str
    store: str
    engines: Mapping[str, EngineAddresses] = field(default_factory=dict)
    """Addresses of engines that are not at `hub`."""
    on_this_host_only: bool = False
    """The links were made for this cluster, between namespaces of this machine."""

    def engine(self, name: str) -> EngineAddresses:
        nic = "lo" if is_loopback(self.hub) else None
        return self.engines.get(name, EngineAddresses(self.hub, self.hub, nic))

    @property
    def every(self) -> list[str]:
        """All addresses of the cluster, each once."""
        own = [address for engine in self.engines.values() for address in (engine.compute, engine.storage)]
        return list(dict.fromkeys([self.hub, self.store, *own]))


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
