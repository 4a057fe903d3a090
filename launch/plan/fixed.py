"""The site of a cluster on several hosts: addresses and ports as its description fixes them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from dualpath_sgl.launch.config.addresses import Addresses, EngineAddresses
from dualpath_sgl.launch.config.cluster import ClusterConfig, ConfigError, Group, Mode
from dualpath_sgl.launch.config.machines import Host
from dualpath_sgl.launch.config.otlp import parsed
from dualpath_sgl.launch.config.security import ROUTER, Security
from dualpath_sgl.launch.plan.process import Part, Process
from dualpath_sgl.launch.plan.site import Site
from dualpath_sgl.launch.plan.whole import make_plan
from dualpath_sgl.launch.processes.commands import EngineSpec, Ports
from dualpath_sgl.launch.processes.relays import RelaySpec, relay_specs
from scheduler_svc.wire.protocol import Role

ENGINE_PORTS = 300
"""Of each engine.  With DP attention SGLang listens 13 and 233 to 240 above its HTTP port, too."""
POD_IP_VARIABLE = "POD_IP"
POD_IP = f"$({POD_IP_VARIABLE})"
"""What Kubernetes puts in place of it in a pod's command and environment: the pod's own address."""
KEYS = Path("/etc/dualpath/keys")
"""Where pods find theirs."""
BOOTSTRAP, MEETING, PAGES = 1, 2, 100
"""Where in them its other ports are; pages take one for each rank."""


def shared_ports(config: ClusterConfig) -> Ports:
    return Ports(**{name: getattr(config.ports, name) for name in Ports.__dataclass_fields__})


def engine_spec(config: ClusterConfig, name: str, first_port: int, first_gpu: int) -> EngineSpec:
    """An engine whose ports are the `ENGINE_PORTS` from `first_port` on."""
    role = Role(name.rpartition("-")[0])
    is_prefill = role is Role.PREFILL
    return EngineSpec(
        name,
        role,
        _group(config, role),
        first_port,
        first_port + BOOTSTRAP if is_prefill else None,
        first_gpu,
        0 if is_prefill else first_port + PAGES,
        first_port + MEETING,
    )


def store_names(count: int) -> tuple[str, ...]:
    """`store` where there is one, else `store-0`, `store-1` and so on."""
    return ("store",) if count == 1 else tuple(f"store-{index}" for index in range(count))


def several_hosts(config: ClusterConfig, spans_path: Path, path: str) -> Site:
    """`config.hosts` is given; `path`: the processes' PATH, all else that they inherit is in the description."""
    hosts = config.hosts or {}
    first = next(iter(hosts))
    scheduler = config.scheduler.host or first
    store_hosts = config.store.hosts or (scheduler,)
    stores = store_names(len(store_hosts))
    places = {
        "scheduler": scheduler,
        "collector": scheduler,
        ROUTER: config.router.host or scheduler,
        "master": store_hosts[0],
        **dict(zip(stores, store_hosts, strict=True)),
        **config.placed_engines(),
    }
    relays = tuple(_relays(config, places))
    for relay in relays:
        places[relay.name] = places[relay.host]
    at_storage = {"master", *stores}
    parts = {
        name: hosts[places[name]].storage_address if name in at_storage else hosts[places[name]].compute
        for name in ("scheduler", "collector", ROUTER, *at_storage)
    }
    users = {*config.placed_engines(), *(relay.host for relay in relays)}
    addresses = Addresses(
        hub=parts["scheduler"],
        store=parts["master"],
        engines={name: _addresses(hosts[places[name]]) for name in sorted(users)},
        parts=parts,
        storage_devices={name: hosts[places[name]].storage_device for name in stores},
    )
    return Site(
        addresses,
        shared_ports(config),
        tuple(_engines(config)),
        relays,
        spans_path,
        {"PATH": path},
        places,
        stores,
    )


def host_plan(config: ClusterConfig, spans_path: Path, path: str) -> tuple[Process, ...]:
    """All processes of a cluster on several hosts.  Raises ConfigError when the description leaves something open."""
    if config.hosts is None:
        raise ConfigError("hosts: must be given: the machines of the cluster, with their addresses")
    check_decided(config)
    return make_plan(config, several_hosts(config, spans_path, path))


def kubernetes_plan(config: ClusterConfig) -> tuple[Process, ...]:
    """All processes of a cluster on Kubernetes, each in a pod.  Raises ConfigError as `host_plan`."""
    pods = config.kubernetes
    if pods is None:
        raise ConfigError("kubernetes: must be given, with the image at least")
    check_decided(config)
    ports = shared_ports(config)
    parts: dict[str, str] = {}
    if config.tracing.enabled and config.tracing.otlp_endpoint is not None:
        receiver = parsed(config.tracing.otlp_endpoint)
        if not receiver.grpc or receiver.tls or config.tracing.otlp_headers:
            raise ConfigError(
                "tracing: pods send spans to a plain OTLP/gRPC receiver, without headers; give otlp_endpoint "
                "HOST:PORT of one in the cluster, which may pass them on"
            )
        parts["collector"], ports = receiver.host, replace(ports, collector=receiver.port)
    tracing = config.tracing.model_copy(update={"enabled": bool(parts)})
    keyed = config.security is not None and config.security.keys is not None
    security = Security.model_construct(keys=KEYS, trusted_network=False) if keyed else config.security
    config = config.model_copy(update={"tracing": tracing, "security": security})
    stores = store_names(pods.stores)
    for name in ("scheduler", "master", ROUTER, *stores):
        parts[name] = name
    groups = {Role.PREFILL: config.prefill, Role.DECODE: config.decode}
    names = [f"{role}-{index}" for role, group in groups.items() for index in range(group.count)]
    engines = tuple(engine_spec(config, name, config.ports.engines, 0) for name in names)
    relays = tuple(
        RelaySpec(name, name, config.ports.relays, config.ports.relays + 1) for name in config.relay_names
    )
    addresses = Addresses(
        hub=parts["scheduler"],
        store=parts["master"],
        engines={
            name: EngineAddresses(POD_IP, POD_IP, None, reached=name)
            for name in (*names, *config.relay_names)
        },
        parts=parts,
        own=POD_IP,
    )
    site = Site(addresses, ports, engines, relays, Path("/dev/null"), {}, {}, stores)
    plan = make_plan(config, site)
    # Spans go where the description says, without a collector of ours on their way.
    return tuple(
        replace(process, after=tuple(name for name in process.after if name != "collector"))
        for process in plan
        if process.part is not Part.COLLECTOR
    )


def check_decided(config: ClusterConfig) -> None:
    """Raises ConfigError when the mode is chosen where the engines are, which is elsewhere."""
    if config.mode is Mode.AUTO:
        raise ConfigError(
            "mode: got 'auto'; the same flags must go to every host, so say which: decode-side or relay "
            "(`dualpath doctor -- FLAGS` tells), basic or both"
        )


def _engines(config: ClusterConfig) -> Iterator[EngineSpec]:
    engines: Counter[str] = Counter()
    gpus: Counter[str] = Counter()
    for name, host in config.placed_engines().items():
        spec = engine_spec(config, name, config.ports.engines + engines[host] * ENGINE_PORTS, gpus[host])
        engines[host] += 1
        gpus[host] += spec.group.tp_size
        yield spec


def _relays(config: ClusterConfig, places: dict[str, str]) -> Iterator[RelaySpec]:
    """Those beside no decode engine get their places here, too."""
    own: Iterable[str] = itertools.cycle(config.relays.hosts)
    on_host: dict[str, Iterator[int]] = {}
    for relay in relay_specs(config, lambda: 0):
        if relay.host not in places:
            places[relay.host] = next(iter(own))
        ports = on_host.setdefault(places[relay.host], itertools.count(config.ports.relays))
        yield RelaySpec(relay.name, relay.host, next(ports), next(ports))


def _addresses(host: Host) -> EngineAddresses:
    return EngineAddresses(
        host.compute,
        host.storage_address,
        None,
        compute_device=host.compute_device,
        storage_device=host.storage_device,
    )


def _group(config: ClusterConfig, role: Role) -> Group:
    return config.prefill if role is Role.PREFILL else config.decode
