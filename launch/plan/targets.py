"""Who of a cluster answers Prometheus, in the form of its `file_sd_configs`."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from dualpath_sgl.launch.config.cluster import ClusterConfig
from dualpath_sgl.launch.plan.site import Site
from dualpath_sgl.launch.processes.commands import SCHEDULED, asks_for_placement
from scheduler_svc.wire.addresses import authority

TARGETS_FILE = "prometheus-targets.json"
"""In the run directory."""


def targets(config: ClusterConfig, site: Site) -> list[dict[str, Any]]:
    """One group for each process; the job says what it is."""
    addresses, ports = site.addresses, site.ports
    router = ports.router if asks_for_placement(config) else ports.router_metrics
    found = [("dualpath-engine", spec.name, urlsplit(spec.url(addresses)).netloc) for spec in site.engines]
    found += [
        ("dualpath-relay", relay.name, urlsplit(relay.metrics_url(addresses)).netloc) for relay in site.relays
    ]
    shared = [("dualpath-router", "router", router), ("mooncake-master", "master", ports.master_metrics)]
    if config.mode in SCHEDULED:
        shared.append(("dualpath-scheduler", "scheduler", ports.scheduler_metrics))
    found += [(job, name, authority(addresses.at(name), port)) for job, name, port in shared]
    return [
        {"targets": [address], "labels": {"job": job, "name": name, "cluster": config.name}}
        for job, name, address in found
    ]
