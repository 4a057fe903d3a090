"""The pod of one process: what it runs, asks, mounts and may use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dualpath_sgl.launch.config.cluster import ClusterConfig, ModelDirectory
from dualpath_sgl.launch.config.kubernetes import Kubernetes
from dualpath_sgl.launch.plan.fixed import KEYS, POD_IP_VARIABLE
from dualpath_sgl.launch.plan.process import Answers, Listens, Part, Process, Says
from dualpath_sgl.launch.render.hosts import STOP_S, at_python
from scheduler_svc.wire.keys import PEERS, PUBLIC, SECRET

Json = dict[str, Any]

PYTHON = Path("python3")
ENGINES = (Part.PREFILL, Part.DECODE)
PUBLIC_KEYS = "dualpath-public-keys"
"""ConfigMap with every `.key` file."""
LENT = 0o440
"""Secrets belong to root, and `fsGroup` lends them to the pod's group."""
START_S = 1800
"""A large model may load for so long before its pod is given up."""
PROBE_S = 10
GIB = 1 << 30
OWN_BYTES = {
    Part.STORE: 2 * GIB,
    Part.RELAY: 3 * GIB,
    Part.MASTER: 4 * GIB,
    Part.SCHEDULER: GIB,
    Part.ROUTER: 2 * GIB,
}
"""Memory of a process beside the pages that it holds; a relay's ring is in it."""
ENGINE_BYTES = 24 * GIB
CPUS = {Part.STORE: 2, Part.RELAY: 4, Part.MASTER: 2, Part.SCHEDULER: 2, Part.ROUTER: 4}
ENGINE_CPUS = 8
"""For each GPU."""


def secret_name(process: str) -> str:
    return f"dualpath-key-{process}"


def labels(config: ClusterConfig, process: Process) -> dict[str, str]:
    return {
        **cluster_labels(config),
        "dualpath.io/process": process.name,
        "dualpath.io/part": process.part.value,
    }


def cluster_labels(config: ClusterConfig) -> dict[str, str]:
    return {"app.kubernetes.io/part-of": "dualpath", "app.kubernetes.io/instance": config.name}


def pod(config: ClusterConfig, pods: Kubernetes, process: Process) -> Json:
    """Its `PodSpec`."""
    mounts, volumes = _volumes(config, pods, process)
    capabilities: Json = {"drop": ["ALL"]}
    if process.resources.rdma and pods.rdma is not None:
        capabilities["add"] = ["IPC_LOCK"]  # registered memory is pinned
    container: Json = {
        "name": process.part.value,
        "image": pods.image,
        "command": list(at_python(process, PYTHON).argv),
        "env": _environment(process.env),
        "ports": [
            {"name": port.name, "containerPort": port.first}
            for port in process.ports
            if port.first == port.last
        ],
        "resources": _resources(pods, process),
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": capabilities},
        "volumeMounts": mounts,
        **_probes(process),
    }
    if not container["ports"]:
        del container["ports"]
    spec: Json = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": pods.user,
            "runAsGroup": pods.user,
            "fsGroup": pods.user,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "terminationGracePeriodSeconds": STOP_S,
        "containers": [container],
        "volumes": volumes,
    }
    if process.part in ENGINES and pods.node_selector:
        spec["nodeSelector"] = dict(pods.node_selector)
    return spec


def _environment(environment: Mapping[str, str]) -> list[Json]:
    """The pod's address first: what refers to it must stand below."""
    own_address = {"name": POD_IP_VARIABLE, "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    # The image has no user of this number: some of torch's modules want a name and a home.
    every = {"HOME": "/tmp", "USER": "dualpath"} | dict(environment)
    return [own_address, *({"name": name, "value": str(every[name])} for name in sorted(every))]


def _resources(pods: Kubernetes, process: Process) -> Json:
    needs = process.resources
    is_engine = process.part in ENGINES
    memory: int | None = OWN_BYTES.get(process.part, ENGINE_BYTES)
    if is_engine:
        # SGLang sizes a host pool by its device pool unless the description gives gigabytes.
        memory = None if needs.memory_bytes is None else ENGINE_BYTES + needs.memory_bytes + pods.shm_bytes
    elif memory is not None:
        memory += needs.memory_bytes or 0
    cpus = ENGINE_CPUS * max(1, needs.gpus) if is_engine else CPUS[process.part]
    requests: dict[str, str] = {"cpu": str(cpus)}
    limits: dict[str, str] = {}
    if memory is not None:
        requests["memory"] = limits["memory"] = str(memory)
    if needs.gpus:
        requests[pods.gpu_resource] = limits[pods.gpu_resource] = str(needs.gpus)
    if needs.rdma and pods.rdma is not None and pods.rdma.resource is not None:
        requests[pods.rdma.resource] = limits[pods.rdma.resource] = "1"
    return {"requests": requests, "limits": limits} if limits else {"requests": requests}


def _probes(process: Process) -> Json:
    ready = process.ready
    match ready:
        case Answers():
            asked: Json = {"httpGet": {"path": ready.path, "port": ready.port}}
        case Listens():
            asked = {"tcpSocket": {"port": ready.port}}
        case Says():
            return {}  # it ends when something is wrong
    every = {**asked, "periodSeconds": PROBE_S, "timeoutSeconds": 5}
    return {
        "startupProbe": {**every, "failureThreshold": START_S // PROBE_S},
        "readinessProbe": {**every, "failureThreshold": 2},
        "livenessProbe": {**every, "failureThreshold": 6},
    }


def _volumes(config: ClusterConfig, pods: Kubernetes, process: Process) -> tuple[list[Json], list[Json]]:
    mounts: list[Json] = [{"name": "tmp", "mountPath": "/tmp"}]
    volumes: list[Json] = [{"name": "tmp", "emptyDir": {}}]

    def add(name: str, where: str, volume: Json, read_only: bool = True) -> None:
        mounts.append({"name": name, "mountPath": where, **({"readOnly": True} if read_only else {})})
        volumes.append({"name": name, **volume})

    if process.secrets:
        add("keys", str(KEYS), {"projected": {"defaultMode": LENT, "sources": _key_sources(config, process)}})
    if process.part in ENGINES:
        shm = {"emptyDir": {"medium": "Memory", "sizeLimit": str(pods.shm_bytes)}}
        add("shm", "/dev/shm", shm, read_only=False)
        if pods.model_claim is not None and isinstance(config.model, ModelDirectory):
            claim = {"persistentVolumeClaim": {"claimName": pods.model_claim, "readOnly": True}}
            add("model", str(config.model.path), claim)
    if process.resources.rdma and pods.rdma is not None and pods.rdma.device_path is not None:
        device = {"hostPath": {"path": pods.rdma.device_path, "type": "Directory"}}
        add("rdma", pods.rdma.device_path, device, read_only=False)
    return mounts, volumes


def _key_sources(config: ClusterConfig, process: Process) -> list[Json]:
    """Its own secret key, and the public ones that it reads, where `dualpath keys generate` puts them."""
    own = [{"key": Path(file).name, "path": file} for file in process.secrets if file.endswith(SECRET)]
    public = [{"key": file, "path": file} for file in process.secrets if file.endswith(PUBLIC)]
    if PEERS in process.secrets:
        names = [f"{name}{PUBLIC}" for name in config.key_names()]
        public += [{"key": name, "path": f"{PEERS}/{name}"} for name in names]
    return [
        {"secret": {"name": secret_name(process.name), "items": own}},
        {"configMap": {"name": PUBLIC_KEYS, "items": public}},
    ]
