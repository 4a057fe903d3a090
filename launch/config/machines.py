"""Hosts of a cluster that one machine does not hold: their addresses, and which part is where."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from dualpath_sgl.launch.config.hosts import checked

Hosts = Mapping[str, "Host"]


def _address(text: str) -> str:
    try:
        return checked(text)
    except ValueError:
        raise ValueError(
            "is neither an address nor a name of a host; give one such as 10.0.0.11 or gpu1.example"
        ) from None


Address = Annotated[str, AfterValidator(_address)]
Device = Annotated[str, Field(pattern=r"^[A-Za-z0-9_,.:-]*$", max_length=200)]
HostName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$", max_length=63)]


class Host(BaseModel):
    """One machine."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    compute: Address
    """On the network between engines; scheduler and router listen there, too."""
    storage: Address | None = None
    """On the network to the store; null: as `compute`."""
    gpus: int = Field(0, ge=0, le=64)
    """Engines take them in order, from 0 up."""
    compute_device: Device = ""
    """RDMA devices on the compute network, such as `mlx5_0`; empty: all that Mooncake finds."""
    storage_device: Device = ""
    """RDMA devices on the storage network."""

    @property
    def storage_address(self) -> str:
        return self.storage or self.compute


class FixedPorts(BaseModel):
    """Where parts listen when they are on several hosts. On one machine alone free ports are drawn."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    master: int = Field(50051, ge=1024, le=65535)
    """Mooncake's master."""
    master_metrics: int = Field(9003, ge=1024, le=65535)
    """Its metrics."""
    scheduler: int = Field(5557, ge=1024, le=65535)
    """The scheduler."""
    scheduler_metrics: int = Field(9557, ge=1024, le=65535)
    """Its metrics and health."""
    collector: int = Field(4317, ge=1024, le=65535)
    """Spans (OTLP/gRPC)."""
    router: int = Field(8000, ge=1024, le=65535)
    """What clients talk to."""
    router_metrics: int = Field(29000, ge=1024, le=65535)
    """Metrics of the Rust router."""
    engines: int = Field(20000, ge=1024, le=45000)
    """First port of a host's engines; each takes 300."""
    relays: int = Field(18000, ge=1024, le=65000)
    """First port of a host's relays; each takes 2."""


class Engines(Protocol):
    """What of a group of engines decides about hosts."""

    @property
    def count(self) -> int: ...
    @property
    def tp_size(self) -> int: ...
    @property
    def hosts(self) -> Sequence[str]: ...


def place_engines(hosts: Hosts, groups: Mapping[str, Engines], needs_gpus: bool) -> dict[str, str]:
    """Host of each engine, such as `prefill-0`.

    Without `hosts` a group may use every host (that has GPUs, if it needs some).  With GPUs a host is filled
    before the next one is used, else engines take turns.  Raises ValueError naming field and remedy.
    """
    free = {name: host.gpus for name, host in hosts.items()}
    placed: dict[str, str] = {}
    for role, group in groups.items():
        on = list(group.hosts) or [name for name, gpus in free.items() if hosts[name].gpus or not needs_gpus]
        for index in range(group.count):
            if needs_gpus:
                fitting = [name for name in on if free[name] >= group.tp_size]
                if not fitting:
                    left = ", ".join(f"{name} {free[name]}" for name in on) or "none"
                    raise ValueError(
                        f"{role}-{index} needs {group.tp_size} GPUs on one host; left are: {left}; give "
                        f"{role}.hosts more, or say in hosts.NAME.gpus how many they have"
                    )
                host = fitting[0]
                free[host] -= group.tp_size
            else:
                host = on[index % len(on)]
            placed[f"{role}-{index}"] = host
    return placed


def check_known(hosts: Hosts | None, field: str, named: Iterable[str]) -> None:
    """Raises ValueError for a host that the description does not have."""
    for name in named:
        if hosts is None:
            raise ValueError(
                f"{field} names host {name!r}, but there is no section hosts; add it, or remove this"
            )
        if name not in hosts:
            raise ValueError(f"{field} names {name!r}, which is no host; choose one of {', '.join(hosts)}")
