"""From a description and a site to all processes of a cluster.  Pure: nothing is started here.

SGLang's and Mooncake's flags are the business of `launch/processes/`.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

from dualpath_sgl.launch.config.cluster import ClusterConfig, Group
from dualpath_sgl.launch.config.security import ROUTER
from dualpath_sgl.launch.config.transport import RDMA
from dualpath_sgl.launch.plan.process import (
    Answers,
    Audience,
    Listens,
    Part,
    Port,
    Process,
    Resources,
    Says,
)
from dualpath_sgl.launch.plan.site import Site
from dualpath_sgl.launch.processes import commands
from dualpath_sgl.launch.processes.commands import EngineSpec
from dualpath_sgl.launch.processes.relays import RelaySpec, relay_command, relay_environment
from dualpath_sgl.launch.processes.store_node import READY as STORE_READY
from scheduler_svc.wire.keys import PEERS, PUBLIC, SECRET, SERVER_NAME

MOONCAKE_PORTS = Port("mooncake", 15000, 17000)
"""Every transfer engine draws some of these, on all addresses of its host."""
PD_PORTS = Port("kv-messages", 49152, 65535)
"""Each rank draws one of these, on which SGLang's ranks tell each other of KV (pyzmq's range)."""
MASTER, COLLECTOR, SCHEDULER = "master", "collector", "scheduler"


def make_plan(config: ClusterConfig, site: Site) -> tuple[Process, ...]:
    """In the order of starting; `config.mode` is chosen."""
    return tuple(_Planner(config, site).processes())


class _Planner:
    def __init__(self, config: ClusterConfig, site: Site) -> None:
        self._config = config
        self._site = site
        self._base = commands.part_environment(site.addresses, site.base)
        self._keyed = config.security is not None and config.security.keys is not None
        self._rdma = RDMA in (config.transport.compute, config.transport.storage, config.transport.pd)

    def processes(self) -> Iterator[Process]:
        yield self._master()
        before = list(self._site.stores)
        if self._config.tracing.enabled:
            before.append(COLLECTOR)
            yield self._collector()
        if self._config.mode in commands.SCHEDULED:
            before.append(SCHEDULER)
            yield self._scheduler()
        for store in self._site.stores:
            yield self._store(store)
        # An engine writes a test object into the store early, so the store comes before.
        for relay in self._site.relays:
            yield self._relay(relay, tuple(before))
        for engine in self._site.engines:
            yield self._engine(engine, tuple(before))
        yield self._router()

    def _master(self) -> Process:
        addresses, ports = self._site.addresses, self._site.ports
        return Process(
            MASTER,
            Part.MASTER,
            self._place(MASTER),
            tuple(commands.master_command(addresses, ports)),
            self._base,
            (),
            (_one("rpc", ports.master), _one("metrics", ports.master_metrics, Audience.MONITORING)),
            Listens(addresses.at(MASTER), ports.master),
            (),
        )

    def _collector(self) -> Process:
        addresses, ports = self._site.addresses, self._site.ports
        argv = commands.collector_command(self._config, addresses, ports, self._site.spans_path)
        return Process(
            COLLECTOR,
            Part.COLLECTOR,
            self._place(COLLECTOR),
            tuple(argv),
            commands.collector_environment(self._config, self._base),
            (),
            (_one("otlp", ports.collector),),
            Listens(addresses.at(COLLECTOR), ports.collector),
            (),
        )

    def _scheduler(self) -> Process:
        addresses, ports = self._site.addresses, self._site.ports
        return Process(
            SCHEDULER,
            Part.SCHEDULER,
            self._place(SCHEDULER),
            tuple(commands.scheduler_command(self._config, addresses, ports)),
            self._base,
            (f"{SERVER_NAME}{SECRET}", PEERS) if self._keyed else (),
            (
                _one("zmq", ports.scheduler),
                _one("metrics", ports.scheduler_metrics, Audience.MONITORING),
            ),
            Answers(addresses.at(SCHEDULER), ports.scheduler_metrics, "/healthz"),
            (),
        )

    def _store(self, name: str) -> Process:
        argv = commands.store_command(self._config, self._site.addresses, self._site.ports, name)
        return Process(
            name,
            Part.STORE,
            self._place(name),
            tuple(argv),
            self._base,
            (),
            (MOONCAKE_PORTS,),
            Says(STORE_READY),
            (MASTER,),
            Resources(memory_bytes=self._config.store.segment_bytes, rdma=self._rdma),
        )

    def _relay(self, relay: RelaySpec, before: tuple[str, ...]) -> Process:
        addresses, ports = self._site.addresses, self._site.ports
        environment = relay_environment(
            self._config,
            addresses,
            relay,
            master=commands.master(addresses, ports),
            collector=commands.collector_url(addresses, ports),
            scheduler=commands.scheduler_url(addresses, ports),
            base=self._base,
        )
        return Process(
            relay.name,
            Part.RELAY,
            self._place(relay.name, relay.host),
            tuple(relay_command()),
            environment,
            self._peer_secrets(relay.name),
            (
                _one("relay", relay.port),
                _one("metrics", relay.metrics_port, Audience.MONITORING),
                MOONCAKE_PORTS,
            ),
            Answers(addresses.engine(relay.host).url_host, relay.metrics_port, "/metrics"),
            before,
            Resources(rdma=self._rdma),
        )

    def _engine(self, engine: EngineSpec, before: tuple[str, ...]) -> Process:
        config, addresses, ports = self._config, self._site.addresses, self._site.ports
        argv = commands.engine_command(config, addresses, engine, ports)
        listens = [_one("http", engine.port), MOONCAKE_PORTS, PD_PORTS]
        if engine.bootstrap_port is not None:
            listens.append(_one("bootstrap", engine.bootstrap_port))
        if engine.page_port:
            listens.append(Port("pages", engine.page_port, engine.page_port + engine.group.tp_size - 1))
        if engine.meeting_port is not None:
            listens.append(_one("ranks", engine.meeting_port))
        return Process(
            engine.name,
            Part(engine.role.value),
            self._place(engine.name),
            tuple(argv),
            commands.engine_environment(config, addresses, engine, ports, self._site.base),
            self._peer_secrets(engine.name) if config.mode in commands.SCHEDULED else (),
            tuple(listens),
            Answers(addresses.engine(engine.name).url_host, engine.port, "/health"),
            before,
            Resources(
                engine.group.tp_size if config.device == "cuda" else 0,
                _host_pool_bytes(engine.group),
                self._rdma,
            ),
            _engine_stop_signal(config),
        )

    def _router(self) -> Process:
        config, addresses, ports = self._config, self._site.addresses, self._site.ports
        placing = commands.asks_for_placement(config)
        listens = [_one("http", ports.router, Audience.CLIENTS)]
        if not placing:
            listens.append(_one("metrics", ports.router_metrics, Audience.MONITORING))
        return Process(
            ROUTER,
            Part.ROUTER,
            self._place(ROUTER),
            tuple(commands.router_command(config, addresses, ports, self._site.engines)),
            self._base | (commands.tracing_environment(config) if config.tracing.enabled else {}),
            (f"{PEERS}/{ROUTER}{SECRET}", f"{SERVER_NAME}{PUBLIC}") if placing and self._keyed else (),
            tuple(listens),
            Answers(addresses.at(ROUTER), ports.router, "/health"),
            (),
        )

    def _place(self, name: str, default: str | None = None) -> str:
        return self._site.places.get(name, default or name)

    def _peer_secrets(self, name: str) -> tuple[str, ...]:
        return (f"{PEERS}/{name}{SECRET}", f"{SERVER_NAME}{PUBLIC}", PEERS) if self._keyed else ()


def _one(name: str, port: int, audience: Audience = Audience.CLUSTER) -> Port:
    return Port(name, port, port, audience)


def _host_pool_bytes(group: Group) -> int | None:
    size_gb = group.host_pool.size_gb
    return None if size_gb is None else size_gb * 10**9 * group.tp_size


def _engine_stop_signal(config: ClusterConfig) -> signal.Signals:
    """SGLang looks for a SIGTERM every 5 s, then drains and lets its ranks release their GPUs.  On a
    CPU nothing needs releasing, and the router, stopped first, has left nothing to drain."""
    return signal.SIGINT if config.device == "cpu" else signal.SIGTERM
