"""A cluster as Kubernetes objects, in a directory that `kubectl apply -k` takes.

kustomization.yaml      what belongs to it; keys become Secrets and a ConfigMap
PROCESS.yaml            a StatefulSet or Deployment, its Service, who may reach it
namespace.yaml          the namespace
service-monitors.yaml   for Prometheus' operator, if asked for
.gitignore              secret keys stay out of it
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import yaml

from dualpath_sgl.launch.config.cluster import ClusterConfig, ConfigError
from dualpath_sgl.launch.config.kubernetes import Kubernetes
from dualpath_sgl.launch.config.transport import RDMA
from dualpath_sgl.launch.plan.process import Audience, Part, Port, Process
from dualpath_sgl.launch.render.pods import (
    ENGINES,
    PUBLIC_KEYS,
    Json,
    cluster_labels,
    labels,
    pod,
    secret_name,
)
from scheduler_svc.wire.keys import PEERS, PUBLIC, SECRET, SERVER_NAME

STATELESS = (Part.SCHEDULER, Part.ROUTER)
"""Deployments behind an address of their Service; the others are found by the address of their pod."""
SERVED = (*STATELESS, Part.MASTER)
"""Reached at the address of a Service, which stays when the pod changes."""
NAMESPACE_LABEL = "kubernetes.io/metadata.name"
MONITORED = "metrics"
SCRAPE = "30s"


def render_kubernetes(config: ClusterConfig, plan: Sequence[Process]) -> dict[str, str]:
    """Text of each file.  `config.kubernetes` is given.  Raises ConfigError."""
    pods = config.kubernetes
    if pods is None:
        raise ConfigError("kubernetes: must be given, with the image at least")
    if pods.rdma is None and RDMA in (
        config.transport.compute,
        config.transport.storage,
        config.transport.pd,
    ):
        raise ConfigError(
            "kubernetes.rdma: must be given with transport rdma: resource, such as rdma/hca, or device_path"
        )
    namespace = pods.namespace or config.name
    files = {"namespace.yaml": [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}]}
    for process in plan:
        files[f"{process.name}.yaml"] = list(_objects(config, pods, process))
    if pods.service_monitor:
        files["service-monitors.yaml"] = list(_service_monitors(config))
    files["kustomization.yaml"] = [_kustomization(config, namespace, plan, sorted(files))]
    texts = {
        name: yaml.dump_all(objects, Dumper=_WrittenOut, sort_keys=False, width=1000)
        for name, objects in files.items()
    }
    if _has_keys(config):
        texts[".gitignore"] = "keys/\n"
    return texts


class _WrittenOut(yaml.SafeDumper):
    """Nothing is told by reference."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _has_keys(config: ClusterConfig) -> bool:
    return config.security is not None and config.security.keys is not None


def _objects(config: ClusterConfig, pods: Kubernetes, process: Process) -> Iterable[Json]:
    yield _workload(config, pods, process)
    yield _service(config, process)
    yield _network_policy(config, pods, process)
    if process.part is Part.ROUTER and pods.routers > 1:
        yield {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": _metadata(config, process),
            "spec": {"minAvailable": pods.routers - 1, "selector": {"matchLabels": labels(config, process)}},
        }


def _metadata(config: ClusterConfig, process: Process) -> Json:
    return {"name": process.name, "labels": labels(config, process)}


def _workload(config: ClusterConfig, pods: Kubernetes, process: Process) -> Json:
    own = labels(config, process)
    spec: Json = {
        "replicas": pods.routers if process.part is Part.ROUTER else 1,
        "selector": {"matchLabels": own},
        "template": {"metadata": {"labels": own}, "spec": pod(config, pods, process)},
    }
    if process.part is Part.SCHEDULER:
        # Two of them would each know half of the engines.
        spec["strategy"] = {"type": "Recreate"}
    if process.part not in STATELESS:
        spec["serviceName"] = process.name
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment" if process.part in STATELESS else "StatefulSet",
        "metadata": _metadata(config, process),
        "spec": spec,
    }


def _service(config: ClusterConfig, process: Process) -> Json:
    spec: Json = {"selector": labels(config, process)}
    ports = [
        {"name": port.name, "port": port.first, "targetPort": port.first}
        for port in process.ports
        if port.first == port.last
    ]
    if ports:
        spec["ports"] = ports
    if process.part not in SERVED:
        # Engines look for each other before they are ready.
        spec |= {"clusterIP": "None", "publishNotReadyAddresses": True}
    return {"apiVersion": "v1", "kind": "Service", "metadata": _metadata(config, process), "spec": spec}


def _network_policy(config: ClusterConfig, pods: Kubernetes, process: Process) -> Json:
    """The cluster's pods reach every port that the plan names, others what is theirs, and nobody another port."""
    sources: dict[Audience, Json] = {
        Audience.CLIENTS: {"namespaceSelector": {"matchLabels": {NAMESPACE_LABEL: pods.client_namespace}}},
        Audience.MONITORING: {
            "namespaceSelector": {"matchLabels": {NAMESPACE_LABEL: pods.monitoring_namespace}}
        },
    }
    inside: Json = {"podSelector": {"matchLabels": cluster_labels(config)}}
    ingress = [{"from": [inside], "ports": [_policy_port(port) for port in process.ports]}]
    for audience, source in sources.items():
        ports = [_policy_port(port) for port in process.ports if audience in _audiences(process, port)]
        if ports:
            ingress.append({"from": [source], "ports": ports})
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(config, process),
        "spec": {
            "podSelector": {"matchLabels": labels(config, process)},
            "policyTypes": ["Ingress"],
            "ingress": ingress,
        },
    }


def _audiences(process: Process, port: Port) -> set[Audience]:
    """SGLang serves its metrics, and the placing router its own, at the port of requests."""
    with_metrics = port.name == "http" and (
        process.part in ENGINES or all(other.name != MONITORED for other in process.ports)
    )
    return {port.audience, Audience.MONITORING} if with_metrics else {port.audience}


def _policy_port(port: Port) -> Json:
    found: Json = {"protocol": "TCP", "port": port.first}
    if port.last != port.first:
        found["endPort"] = port.last
    return found


def _service_monitors(config: ClusterConfig) -> Iterable[Json]:
    """Of everything with a port of its own for metrics, and of what serves them beside requests."""
    for name, port in (("dualpath-metrics", MONITORED), ("dualpath-http", "http")):
        yield {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "ServiceMonitor",
            "metadata": {"name": name, "labels": cluster_labels(config)},
            "spec": {
                "selector": {"matchLabels": cluster_labels(config)},
                "targetLabels": ["dualpath.io/process", "dualpath.io/part"],
                "endpoints": [{"port": port, "path": "/metrics", "interval": SCRAPE}],
            },
        }


def _kustomization(
    config: ClusterConfig, namespace: str, plan: Iterable[Process], resources: Iterable[str]
) -> Json:
    made: Json = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": namespace,
        "resources": list(resources),
    }
    if _has_keys(config):
        peers = [f"keys/{PEERS}/{name}{PUBLIC}" for name in config.key_names()]
        made["secretGenerator"] = [
            {"name": secret_name(process.name), "files": [f"keys/{file}"]}
            for process in plan
            for file in process.secrets
            if file.endswith(SECRET)
        ]
        made["configMapGenerator"] = [{"name": PUBLIC_KEYS, "files": [f"keys/{SERVER_NAME}{PUBLIC}", *peers]}]
    return made
