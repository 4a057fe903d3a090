"""What a backend knows of a cluster: where its parts are, and on which ports they listen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dualpath_sgl.launch.config.addresses import Addresses
from dualpath_sgl.launch.config.cluster import ClusterConfig
from dualpath_sgl.launch.processes.commands import EngineSpec, Ports, engine_specs
from dualpath_sgl.launch.processes.ports import DP_ATTENTION_OFFSETS, FreePorts
from dualpath_sgl.launch.processes.relays import RelaySpec, relay_specs


@dataclass(frozen=True)
class Site:
    addresses: Addresses
    ports: Ports
    engines: tuple[EngineSpec, ...]
    relays: tuple[RelaySpec, ...]
    spans_path: Path
    """What the collector writes."""
    base: Mapping[str, str]
    """Environment that every process inherits."""
    places: Mapping[str, str] = field(default_factory=dict)
    """Host of each process, by name; empty: all on one."""
    stores: tuple[str, ...] = ("store",)
    """Names of the store's nodes."""


@dataclass(frozen=True)
class Drawn:
    """Ports that were free on this machine: the same ones each time that the cluster's site is asked for."""

    ports: Ports
    engines: tuple[EngineSpec, ...]
    relays: tuple[RelaySpec, ...]


def draw(config: ClusterConfig) -> Drawn:
    """Raises OSError when no port is free, or `config.host` is no address of this machine."""
    free = FreePorts(config.host)
    take: Callable[[], int] = free.take
    ports = Ports(**{name: take() for name in Ports.__dataclass_fields__})
    engines = engine_specs(config, lambda: free.take(DP_ATTENTION_OFFSETS))
    return Drawn(ports, tuple(engines), tuple(relay_specs(config, take)))
