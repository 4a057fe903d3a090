"""One host's part of a cluster, as child processes of this one (`dualpath up --host NAME`)."""

from __future__ import annotations

import os
from pathlib import Path
from types import MappingProxyType

from dualpath_sgl.launch.config.cluster import ClusterConfig, ConfigError
from dualpath_sgl.launch.config.security import OPERATOR, key_files
from dualpath_sgl.launch.plan.fixed import host_plan, several_hosts
from dualpath_sgl.launch.plan.process import Part, Process
from dualpath_sgl.launch.processes import commands
from dualpath_sgl.launch.processes.run_dir import ClusterState
from dualpath_sgl.launch.supervision.planned import PlannedSupervisor
from scheduler_svc.wire.addresses import authority


class HostPart(PlannedSupervisor):
    """Whatever of it dies once it has started is started again: what it serves is on other hosts, too."""

    def __init__(self, config: ClusterConfig, host: str, run_dir: Path):
        """Raises ConfigError for a host that the description does not have, or has nothing for."""
        super().__init__(run_dir)
        spans = self.run_dir / "spans.jsonl"
        path = os.environ.get("PATH", os.defpath)
        self.plan = host_plan(config, spans, path)
        """Of the whole cluster."""
        if host not in (config.hosts or {}):
            raise ConfigError(f"--host {host} is none of hosts: {', '.join(config.hosts or {})}")
        self.own: tuple[Process, ...] = tuple(process for process in self.plan if process.place == host)
        """Of this host."""
        if not self.own:
            raise ConfigError(
                f"--host {host} has nothing to run; name it in prefill.hosts or another section"
            )
        self._config = config
        self._site = several_hosts(config, spans, path)
        meanwhile = "the other hosts go on without it"
        self.spared = MappingProxyType({process.name: meanwhile for process in self.own})

    @property
    def url(self) -> str:
        """Base URL of the router, wherever it is."""
        return f"http://{authority(self._site.addresses.at('router'), self._site.ports.router)}"

    def _start(self) -> None:
        names = {process.name for process in self.own}
        self._launch_plan(self.own, [process for process in self.plan if process.name not in names])

    def _write_state(self) -> None:
        site = self._site
        has_scheduler = any(process.part is Part.SCHEDULER for process in self.plan)
        ClusterState(
            name=self._config.name,
            mode=self._config.mode,
            url=self.url,
            scheduler=commands.scheduler_url(site.addresses, site.ports) if has_scheduler else None,
            scheduler_keys=key_files(self._config.security, OPERATOR),
            engines={spec.name: spec.url(site.addresses) for spec in site.engines},
            relays={relay.name: relay.endpoint(site.addresses) for relay in site.relays},
            processes={name: self._state_of(name, process) for name, process in self.processes.items()},
        ).write(self.run_dir)
