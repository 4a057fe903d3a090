"""A description of a cluster on three hosts, and its plan."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

from dualpath_sgl.launch.config.cluster import ClusterConfig, load
from dualpath_sgl.launch.plan.fixed import host_plan
from dualpath_sgl.launch.plan.process import Process

HOSTS: dict[str, Any] = {
    "name": "agents",
    "device": "cuda",
    "mode": "decode-side",
    "model": {"kind": "directory", "path": "/models/Qwen3-8B"},
    "page_size": 64,
    "hosts": {
        "gpu1": {"compute": "10.2.0.1", "storage": "10.1.0.1", "gpus": 8, "compute_device": "mlx5_0"},
        "gpu2": {"compute": "10.2.0.2", "storage": "10.1.0.2", "gpus": 8, "storage_device": "mlx5_1"},
        "mem1": {"compute": "10.2.0.9", "storage": "10.1.0.9", "storage_device": "mlx5_9"},
    },
    "transport": {"compute": "rdma", "storage": "rdma"},
    "prefill": {"count": 2, "tp_size": 4, "hosts": ["gpu1"], "host_pool": {"size_gb": 64}},
    "decode": {"count": 2, "tp_size": 4, "hosts": ["gpu2"], "host_pool": {"size_gb": 64}},
    "store": {"hosts": ["mem1"]},
    "scheduler": {"host": "mem1"},
    "security": {"trusted_network": True},
}


def described(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(HOSTS) | changes


def loaded(directory: Path, **changes: Any) -> ClusterConfig:
    """Raises ConfigError."""
    path = directory / "cluster.yaml"
    path.write_text(yaml.safe_dump(described(**changes)))
    return load(path)


def on_hosts(directory: Path, **changes: Any) -> dict[str, Process]:
    plan = host_plan(loaded(directory, **changes), Path("/var/lib/dualpath/agents/spans.jsonl"), "/usr/bin")
    return {process.name: process for process in plan}
