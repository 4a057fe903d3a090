"""One plain SGLang server, to compare a cluster with."""

from __future__ import annotations

import os
from pathlib import Path

from dualpath_sgl.launch.config.addresses import on_one_host
from dualpath_sgl.launch.config.cluster import (
    ClusterConfig,
    at_its_address,
)
from dualpath_sgl.launch.processes import commands
from dualpath_sgl.launch.processes.ports import DP_ATTENTION_OFFSETS, FreePorts
from dualpath_sgl.launch.supervision.supervisor import Supervisor, healthy
from scheduler_svc.wire.addresses import authority


class SingleServer(Supervisor):
    """One plain SGLang server (no PD, no HiCache) of the cluster's model: the reference for tokens."""

    def __init__(self, config: ClusterConfig, run_dir: Path):
        super().__init__(run_dir)
        self.config = at_its_address(config)
        self._addresses = on_one_host(self.config.host)
        self._port = FreePorts(config.host).take(DP_ATTENTION_OFFSETS)

    @property
    def url(self) -> str:
        return f"http://{authority(self._addresses.hub, self._port)}"

    def _start(self) -> None:
        argv = commands.single_server_command(self.config, self._port)
        base = commands.part_environment(self._addresses, os.environ)
        environment = commands.server_environment(
            self.config, self.config.prefill, self._addresses.engine("single"), base
        )
        environment |= self.config.prefill.env
        self._launch("single", argv, environment, healthy(self.url))
        self._await_ready(["single"])
