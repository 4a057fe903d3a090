"""A whole cluster as child processes of this one.

    client -> router -> PEs and DEs -> store node (memory), master (index)
                            |-> scheduler (modes decode-side and relay), relays, collector (tracing)

`run_dir/cluster.json` says what runs where.  A dead engine ends the cluster: it holds requests, takes
a minute to come back, and mostly dies of what would kill it again.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from dualpath_sgl.launch.checks.choice import choose
from dualpath_sgl.launch.config.addresses import STORE_PROCESSES, Addresses, on_network, on_one_host
from dualpath_sgl.launch.config.cluster import (
    ClusterConfig,
    ConfigError,
    Mode,
    at_its_address,
    bits_per_s,
    kv_bytes_per_token,
)
from dualpath_sgl.launch.config.cluster import Network as NetworkConfig
from dualpath_sgl.launch.config.security import OPERATOR, key_files
from dualpath_sgl.launch.plan.process import Part, Process
from dualpath_sgl.launch.plan.site import Site, draw
from dualpath_sgl.launch.plan.targets import TARGETS_FILE, targets
from dualpath_sgl.launch.plan.whole import make_plan
from dualpath_sgl.launch.processes import commands
from dualpath_sgl.launch.processes.environment import foreign
from dualpath_sgl.launch.processes.process import ManagedProcess
from dualpath_sgl.launch.processes.run_dir import ClusterState
from dualpath_sgl.launch.setup.patching import PatchError
from dualpath_sgl.launch.supervision import exposure
from dualpath_sgl.launch.supervision.direct_http import fetch
from dualpath_sgl.launch.supervision.engine_watch import SILENT_AFTER_S, EngineWatch
from dualpath_sgl.launch.supervision.planned import PlannedSupervisor
from dualpath_sgl.launch.supervision.supervisor import (
    POLL_S,
    PROBE_TIMEOUT_S,
    StartTimeout,
)
from dualpath_sgl.launch.topology.network import Network
from dualpath_sgl.launch.topology.plan import STORE, Rates
from scheduler_svc.wire.addresses import authority
from scheduler_svc.wire.client import SchedulerClient
from scheduler_svc.wire.engine_names import server_id
from scheduler_svc.wire.protocol import Role

REJOIN_TIMEOUT_S = 15.0
FLUSH_TIMEOUT_S = 20.0
GENERATE_TIMEOUT_S = 60.0
UNTRACED = {"traceparent": f"00-{'1' * 32}-{'1' * 16}-00"}
"""Whoever gets this records no span (W3C Trace Context, `trace-flags`): a probe is no request."""


@dataclass(frozen=True)
class EngineHandle:
    """One running SGLang server."""

    name: str
    """`prefill-0`, `decode-1`, ..."""
    role: Role
    url: str
    bootstrap_port: int | None
    """Where decode engines ask a prefill engine; only that has one."""
    _process: ManagedProcess

    @property
    def pid(self) -> int | None:
        """None while it does not run."""
        return self._process.pid


@dataclass(frozen=True)
class RelayHandle:
    """One relay."""

    name: str
    """`relay-0`, ..."""
    endpoint: str
    metrics_url: str
    """Prometheus."""


class Cluster(PlannedSupervisor):
    """The cluster that `config` describes.  Entering the context starts it, if it is not started."""

    spared = MappingProxyType(
        {
            "scheduler": "engines go on with the prefill path and the relays that they know",
            "collector": "spans are lost meanwhile",
            "router": "clients are refused meanwhile",
            "master": "prompts are computed meanwhile, and what was stored is forgotten",
            "store": "prompts are computed meanwhile, and what was stored is gone",
        }
    )

    def __init__(self, config: ClusterConfig, run_dir: Path):
        super().__init__(run_dir)
        if config.kubernetes is not None:
            raise ConfigError(
                "kubernetes: is for `dualpath render kubernetes`; leave it out to start it here"
            )
        if config.hosts is not None:
            raise ConfigError(f"hosts: names {', '.join(config.hosts)}; start each one's part: --host NAME")
        config.model.directory()  # A tiny model that is not there yet is made before anything starts.
        self._asked_mode = config.mode
        self.config, self.why_this_mode = self._chosen(at_its_address(config))
        """As it runs now, in a mode that is not auto (`set_policy` changes it)."""
        drawn = draw(self.config)
        self.addresses: Addresses = on_one_host(self.config.host)
        """With a shaped network: known once it is started."""
        self.network: Network | None = None
        """The shaped network, while it exists."""
        self.ports, self._specs, self._relay_specs = drawn.ports, drawn.engines, drawn.relays
        without = "prefill engines read its share themselves meanwhile"
        self.spared = MappingProxyType(
            {**self.spared, **{relay.name: without for relay in self._relay_specs}}
        )

    @staticmethod
    def _chosen(config: ClusterConfig) -> tuple[ClusterConfig, str]:
        try:
            return choose(config, os.environ)
        except (RuntimeError, PatchError) as error:
            raise ConfigError(f"mode: cannot be chosen: {error}; give one") from None

    @cached_property
    def kv_bytes_per_token(self) -> int:
        """Raises ConfigError when the model's `config.json` does not tell."""
        return kv_bytes_per_token(self.config)

    @property
    def url(self) -> str:
        """Base URL of the router, where clients send requests."""
        return f"http://{authority(self.addresses.at('router'), self.ports.router)}"

    @property
    def scheduler_address(self) -> str:
        """ZeroMQ address; answered only with decode-side loads."""
        return commands.scheduler_url(self.addresses, self.ports)

    def ask_scheduler(self) -> SchedulerClient:
        """A client with the operator's key, where there are keys."""
        return SchedulerClient(self.scheduler_address, curve_key_files=self._operator_keys)

    @property
    def _operator_keys(self) -> tuple[Path, Path] | None:
        return key_files(self.config.security, OPERATOR)

    @property
    def master_metrics_url(self) -> str:
        return f"http://{authority(self.addresses.at('master'), self.ports.master_metrics)}/metrics"

    @property
    def collector_url(self) -> str:
        """OTLP/gRPC; answered only with tracing."""
        return commands.collector_url(self.addresses, self.ports)

    @property
    def spans_path(self) -> Path:
        """OTLP JSON, one export request a line; the collector appends to it."""
        return self.run_dir / "spans.jsonl"

    def wait(self) -> None:
        """Says too which engines run, but answer nobody: those may come back, so nothing ends."""
        urls = {spec.name: spec.url(self.addresses) for spec in self._specs}
        with EngineWatch(urls) as self._watch:
            super().wait()

    def _look(self) -> None:
        super()._look()
        silent = self._watch.silent()
        for name in silent - self._silent:
            self._on_event(
                f"error: {name} runs, but has not answered for {SILENT_AFTER_S:g} s; requests for it fail. "
                f"If it does not come back, start the cluster again (log {self.processes[name].log_path})"
            )
        for name in self._silent - silent:
            self._on_event(f"{name} answers again")
        if silent != self._silent:
            self._silent = silent
            self._write_state()

    def stop(self) -> None:
        super().stop()
        (self.run_dir / TARGETS_FILE).unlink(missing_ok=True)
        if self.network is not None:
            self.network.remove()
            self.network = None

    @property
    def engines(self) -> list[EngineHandle]:
        return [
            EngineHandle(
                spec.name,
                spec.role,
                spec.url(self.addresses),
                spec.bootstrap_port,
                self._process(spec.name),
            )
            for spec in self._specs
        ]

    @property
    def relays(self) -> list[RelayHandle]:
        return [
            RelayHandle(relay.name, relay.endpoint(self.addresses), relay.metrics_url(self.addresses))
            for relay in self._relay_specs
        ]

    def flush_caches(self, role: Role | None = None) -> None:
        """Empty L1 and L2 of every engine (of one role); the store keeps its pages.

        An engine refuses while it is busy, as it is shortly after an answer.  Raises HTTPError when
        it still refuses after FLUSH_TIMEOUT_S.
        """
        deadline_s = time.monotonic() + FLUSH_TIMEOUT_S
        for engine in self.engines:
            while role in (None, engine.role):
                try:
                    _post(f"{engine.url}/flush_cache")
                    break
                except urllib.error.HTTPError:
                    if time.monotonic() > deadline_s:
                        raise
                    time.sleep(POLL_S)

    def set_policy(self, policy: str, placement: str | None = None) -> None:
        """Change the scheduler's path policy (and placement) by restarting it; engines reconnect
        within a second.
        """
        changes = {"policy": policy} | ({"placement": placement} if placement else {})
        scheduler = self.config.scheduler.model_copy(update=changes)
        self.config = self.config.model_copy(update={"scheduler": scheduler})
        [argv] = [process.argv for process in self.plan() if process.part is Part.SCHEDULER]
        self._process("scheduler").argv = list(argv)
        self.restart("scheduler")
        expected = {spec.name for spec in self._specs}
        deadline_s = time.monotonic() + REJOIN_TIMEOUT_S
        with self.ask_scheduler() as client:
            while expected != {server_id(e.engine.engine_id) for e in client.status(PROBE_TIMEOUT_S).engines}:
                if time.monotonic() > deadline_s:
                    raise StartTimeout(f"engines did not join the scheduler again in {REJOIN_TIMEOUT_S:g} s")
                time.sleep(POLL_S)

    def _start(self) -> None:
        begun_s = time.monotonic()
        if left_out := foreign(os.environ):
            self._on_event(
                f"left out of the cluster's environment: {', '.join(left_out)}; if one is meant, give it in "
                "the cluster file: prefill.env, decode.env"
            )
        if self._asked_mode is Mode.AUTO:
            self._on_event(f"mode {self.config.mode}: {self.why_this_mode}")
        if self.config.network is not None:
            self._build_network(self.config.network)
        elif (problem := exposure.warning(exposure.public_addresses())) is not None:
            self._on_event(problem)
        self._launch_plan(self.plan())
        (self.run_dir / TARGETS_FILE).write_text(json.dumps(targets(self.config, self._site), indent=1))
        self._await_requests()
        self._on_event(f"cluster ready after {time.monotonic() - begun_s:.1f} s: {self.url}")

    def plan(self) -> tuple[Process, ...]:
        """Its processes as they are started now, in order."""
        return make_plan(self.config, self._site)

    @property
    def _site(self) -> Site:
        return Site(
            self.addresses, self.ports, self._specs, self._relay_specs, self.spans_path, dict(os.environ)
        )

    def _build_network(self, described: NetworkConfig) -> None:
        rates = Rates(
            storage_bits_per_s=_bits_per_s(described.storage_rate),
            compute_bits_per_s=_bits_per_s(described.compute_rate),
            store_bits_per_s=_bits_per_s(described.store_rate),
        )
        hosts = [spec.name for spec in self._specs] + [relay.host for relay in self._relay_specs]
        self.network = Network.build(list(dict.fromkeys(hosts)), rates)
        self.addresses = on_network(self.network.plan)
        self._on_event(
            f"network {self.network.plan.prefix}*: storage links {described.storage_rate or 'unshaped'}, "
            f"compute links {described.compute_rate or 'unshaped'}, "
            f"store {described.store_rate or 'unshaped'}"
        )

    def _enter(self, name: str, argv: list[str]) -> list[str]:
        member = STORE if name in STORE_PROCESSES else self._host_of(name)
        if self.network is None or member not in self.network.plan.members:
            return argv
        return self.network.enter(member, argv)

    def _host_of(self, name: str) -> str:
        return next((relay.host for relay in self._relay_specs if relay.name == name), name)

    def _await_requests(self) -> None:
        """The router is healthy before it knows its workers: send requests until every pair answered."""
        self._probes["requests"] = self._generates
        for _ in range(max(self.config.prefill.count, self.config.decode.count)):
            self._await_ready(["requests"])

    def _generates(self) -> bool:
        # Longer than a page: SGLang compiles its page hash when the first page is hashed.
        prompt = [token % 250 for token in range(2 * self.config.page_size + 1)]
        body = {"input_ids": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": 2}}
        try:
            return "output_ids" in json.loads(_post(f"{self.url}/generate", body, UNTRACED))
        except (OSError, ValueError):
            return False

    def _write_state(self) -> None:
        ClusterState(
            name=self.config.name,
            mode=self.config.mode,
            url=self.url,
            scheduler=self.scheduler_address if "scheduler" in self.processes else None,
            scheduler_keys=self._operator_keys,
            engines={engine.name: engine.url for engine in self.engines},
            relays={relay.name: relay.endpoint for relay in self.relays},
            processes={name: self._state_of(name, process) for name, process in self.processes.items()},
        ).write(self.run_dir)


def _bits_per_s(rate: str | None) -> int | None:
    return None if rate is None else bits_per_s(rate)


def _post(url: str, body: dict | None = None, headers: dict[str, str] | None = None) -> bytes:
    """Raises OSError (urllib.error.HTTPError for an HTTP error status)."""
    data = json.dumps(body or {}).encode()
    every = {"Content-Type": "application/json", **(headers or {})}
    request = urllib.request.Request(url, data, every, method="POST")
    return fetch(request, GENERATE_TIMEOUT_S)
