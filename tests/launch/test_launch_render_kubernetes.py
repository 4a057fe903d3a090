"""What `dualpath render kubernetes` writes: read back, judged by Kubernetes' own schemas, built by kustomize."""

from __future__ import annotations

import copy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from typer.testing import CliRunner

from dualpath_sgl.launch.config.cluster import ClusterConfig, ConfigError, load
from dualpath_sgl.launch.plan.fixed import kubernetes_plan
from dualpath_sgl.launch.plan.process import Process
from dualpath_sgl.launch.render.command import render_app
from dualpath_sgl.launch.render.kubernetes import render_kubernetes
from scheduler_svc.wire.keys import generate

PODS = {
    "name": "agents",
    "device": "cuda",
    "mode": "relay",
    "model": {"kind": "directory", "path": "/models/Qwen3-8B"},
    "page_size": 64,
    "kubernetes": {
        "image": "registry.example/dualpath:0.1.0",
        "model_claim": "models",
        "rdma": {"resource": "rdma/hca"},
        "pod_network": "10.244.0.0/16",
        "service_monitor": True,
        "stores": 2,
    },
    "transport": {"compute": "rdma", "storage": "rdma"},
    "prefill": {"count": 2, "tp_size": 4, "host_pool": {"size_gb": 64}},
    "decode": {"count": 1, "tp_size": 2},
    "router": {"kind": "placing"},
    "tracing": {"otlp_endpoint": "jaeger.tracing:4317"},
}
PEERS = ["prefill-0", "prefill-1", "decode-0", "relay-0", "router", "operator"]


def described(**changes: Any) -> dict[str, Any]:
    """A section of `changes` that is a mapping is put into that of `PODS`."""
    made = copy.deepcopy(PODS)
    for name, change in changes.items():
        whole = name in ("security", "tracing", "transport")
        made[name] = {**made.get(name, {}), **change} if isinstance(change, dict) and not whole else change
    return made


def loaded(directory: Path, **changes: Any) -> ClusterConfig:
    path = directory / "cluster.yaml"
    path.write_text(yaml.safe_dump(described(**({"security": {"trusted_network": True}} | changes))))
    return load(path)


class Rendered:
    def __init__(self, config: ClusterConfig) -> None:
        self.plan: dict[str, Process] = {process.name: process for process in kubernetes_plan(config)}
        self.files = render_kubernetes(config, list(self.plan.values()))
        self.objects: list[dict[str, Any]] = [
            found
            for name, text in self.files.items()
            if name.endswith(".yaml")
            for found in yaml.safe_load_all(text)
        ]

    def one(self, kind: str, name: str) -> dict[str, Any]:
        [found] = [
            one for one in self.objects if (one["kind"], one.get("metadata", {}).get("name")) == (kind, name)
        ]
        return found

    def pod(self, name: str) -> dict[str, Any]:
        [found] = [
            one
            for one in self.objects
            if one["kind"] in ("Deployment", "StatefulSet") and one["metadata"]["name"] == name
        ]
        return found["spec"]["template"]["spec"]

    def container(self, name: str) -> dict[str, Any]:
        return self.pod(name)["containers"][0]


@pytest.fixture
def rendered(tmp_path) -> Rendered:
    return Rendered(loaded(tmp_path))


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("deployed") / "keys"
    generate(directory, PEERS)
    return directory


DEVICE_PATH = {"kubernetes": {"rdma": {"resource": None, "device_path": "/dev/infiniband"}}}
VARIANTS: dict[str, dict[str, Any]] = {
    "relay": {},
    "decode-side": {"mode": "decode-side", "decode": {"tp_size": 4}, **DEVICE_PATH},
    "upstream over tcp": {
        "mode": "basic",
        "tracing": {"enabled": False},
        "transport": {},
        "router": {"kind": "rust"},
        "kubernetes": {"rdma": None, "pod_network": None, "routers": 1},
    },
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_kubernetes_schemas_know_every_field_of_every_object(tmp_path, changes):
    known = 0
    for found in Rendered(loaded(tmp_path, **changes)).objects:
        if found["kind"] not in ("ServiceMonitor", "Kustomization"):  # no part of Kubernetes itself
            kubernetes_validate.validate(found, "1.37", strict=True)
            known += 1
    assert known > 10


def test_the_schemas_would_refuse_a_field_that_is_not_there(rendered):
    wrong = rendered.one("StatefulSet", "decode-0")
    wrong["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readinesProbe"):
        kubernetes_validate.validate(wrong, "1.37", strict=True)


def test_every_process_of_the_plan_is_one_workload_with_its_command_and_environment(rendered):
    workloads = {
        one["metadata"]["name"] for one in rendered.objects if one["kind"] in ("Deployment", "StatefulSet")
    }
    assert workloads == rendered.plan.keys()
    for name, process in rendered.plan.items():
        container = rendered.container(name)
        program = "mooncake_master" if name == "master" else "python3"
        assert container["command"] == [program, *process.argv[1:]]
        given = {one["name"]: one.get("value") for one in container["env"]}
        assert dict(process.env).items() <= given.items()


def test_a_pod_s_address_is_known_before_anything_refers_to_it(rendered):
    for name in rendered.plan:
        first, *others = rendered.container(name)["env"]
        assert first == {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
        assert "POD_IP" not in {one["name"] for one in others}
    assert "--host=$(POD_IP)" in rendered.container("decode-0")["command"]


def test_parts_call_each_other_by_the_names_of_services(rendered):
    services = {one["metadata"]["name"]: one["spec"] for one in rendered.objects if one["kind"] == "Service"}
    engine = {one["name"]: one.get("value") for one in rendered.container("decode-0")["env"]}
    assert (
        engine["DUALPATH_SCHEDULER"] == "tcp://scheduler:5557" and engine["MOONCAKE_MASTER"] == "master:50051"
    )
    assert engine["DUALPATH_OTLP_ENDPOINT"] == "http://jaeger.tracing:4317"
    router = rendered.container("router")["command"]
    at = router.index("--prefill")
    assert router[at + 1 : at + 3] == ["http://prefill-0:20000", "20001"]
    assert {"scheduler", "master", "prefill-0", "prefill-1", "decode-0"} <= services.keys()
    headless = {name for name, spec in services.items() if spec.get("clusterIP") == "None"}
    assert headless == rendered.plan.keys() - {"scheduler", "master", "router"}


def test_engines_that_pods_tell_of_are_admitted_by_a_placing_router(rendered):
    assert (
        "--dualpath-engine-url-prefix=http://10.244.0.0/16:20000" in rendered.container("router")["command"]
    )


def test_no_pod_is_privileged_root_or_on_its_node_s_network(rendered):
    for name in rendered.plan:
        pod, container = rendered.pod(name), rendered.container(name)
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
        assert "hostNetwork" not in pod and "privileged" not in container["securityContext"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]


def test_only_who_moves_pages_over_rdma_gets_a_device_and_may_pin_memory(rendered):
    for name in rendered.plan:
        container = rendered.container(name)
        moves = name not in ("master", "scheduler", "router")
        assert ("rdma/hca" in container["resources"].get("limits", {})) is moves
        assert ("add" in container["securityContext"]["capabilities"]) is moves


def test_a_device_path_is_mounted_where_it_is_on_the_node(tmp_path):
    rendered = Rendered(loaded(tmp_path, **DEVICE_PATH))
    assert {"name": "rdma", "mountPath": "/dev/infiniband"} in rendered.container("store-0")["volumeMounts"]
    assert not any("rdma" in key for key in rendered.container("store-0")["resources"]["limits"])


def test_engines_get_their_gpus_shared_memory_and_room_for_their_host_pool(rendered):
    prefill = rendered.container("prefill-0")["resources"]["limits"]
    assert prefill["nvidia.com/gpu"] == "4"
    assert int(prefill["memory"]) > 4 * 64 * 10**9
    assert rendered.container("decode-0")["resources"]["limits"]["nvidia.com/gpu"] == "2"
    assert "memory" not in rendered.container("decode-0")["resources"]["limits"], "SGLang decides"
    mounts = {mount["mountPath"] for mount in rendered.container("decode-0")["volumeMounts"]}
    assert {"/dev/shm", "/models/Qwen3-8B"} <= mounts


def test_probes_ask_what_the_plan_calls_ready(rendered):
    scheduler = rendered.container("scheduler")
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert scheduler[probe]["httpGet"] == {"path": "/healthz", "port": 9557}
        assert rendered.container("master")[probe]["tcpSocket"] == {"port": 50051}
        assert rendered.container("decode-0")[probe]["httpGet"] == {"path": "/health", "port": 20000}


def admitted(rendered: Rendered, name: str, label: str) -> set[tuple[int, int]]:
    """Ports that pods which `label` is about may reach."""
    spec = rendered.one("NetworkPolicy", name)["spec"]
    return {
        (port["port"], port.get("endPort", port["port"]))
        for rule in spec["ingress"]
        if label in str(rule["from"])
        for port in rule["ports"]
    }


def test_network_policies_admit_the_cluster_to_every_port_and_others_to_theirs(rendered):
    for name, process in rendered.plan.items():
        wanted = {(port.first, port.last) for port in process.ports}
        assert admitted(rendered, name, "part-of") == wanted
    assert admitted(rendered, "router", "gateway") == {(8000, 8000)}
    assert admitted(rendered, "scheduler", "monitoring") == {(9557, 9557)}
    assert admitted(rendered, "decode-0", "monitoring") == {(20000, 20000)}
    assert all(admitted(rendered, name, "gateway") == set() for name in rendered.plan if name != "router")


def test_a_policy_binds_the_pods_of_its_process_and_no_others(rendered):
    for name in rendered.plan:
        chosen = rendered.one("NetworkPolicy", name)["spec"]["podSelector"]["matchLabels"]
        for other in rendered.plan:
            kind = "Deployment" if other in ("scheduler", "router") else "StatefulSet"
            has = rendered.one(kind, other)["spec"]["template"]["metadata"]["labels"]
            assert (chosen.items() <= has.items()) is (other == name)


def test_there_is_one_scheduler_at_a_time_and_always_a_router(rendered):
    scheduler = rendered.one("Deployment", "scheduler")["spec"]
    assert (scheduler["replicas"], scheduler["strategy"]) == (1, {"type": "Recreate"})
    assert rendered.one("Deployment", "router")["spec"]["replicas"] == 2
    assert rendered.one("PodDisruptionBudget", "router")["spec"]["minAvailable"] == 1


def test_every_port_that_a_monitor_reads_is_one_of_a_service(rendered):
    services = [one["spec"] for one in rendered.objects if one["kind"] == "Service"]
    named = {port["name"] for spec in services for port in spec.get("ports", ())}
    monitors = [one for one in rendered.objects if one["kind"] == "ServiceMonitor"]
    assert {endpoint["port"] for one in monitors for endpoint in one["spec"]["endpoints"]} <= named
    assert len(monitors) == 2


def test_each_pod_gets_its_own_secret_key_readable_by_its_group(tmp_path, keys):
    rendered = Rendered(loaded(tmp_path, security={"keys": str(keys)}))
    for name in ("prefill-0", "decode-0", "relay-0", "router", "scheduler"):
        [volume] = [one for one in rendered.pod(name)["volumes"] if one["name"] == "keys"]
        assert (
            volume["projected"]["defaultMode"] == 0o440
            and rendered.pod(name)["securityContext"]["fsGroup"] == 10001
        )
        paths = {
            item["path"]
            for source in volume["projected"]["sources"]
            for one in source.values()
            for item in one["items"]
        }
        own = "scheduler.key_secret" if name == "scheduler" else f"peers/{name}.key_secret"
        assert {path for path in paths if path.endswith("secret")} == {own}
    assert not any(one["name"] == "keys" for one in rendered.pod("store-0")["volumes"])


def test_an_engine_finds_every_key_file_that_its_environment_names(tmp_path, keys):
    rendered = Rendered(loaded(tmp_path, security={"keys": str(keys)}))
    [volume] = [one for one in rendered.pod("decode-0")["volumes"] if one["name"] == "keys"]
    paths = {
        item["path"]
        for source in volume["projected"]["sources"]
        for one in source.values()
        for item in one["items"]
    }
    [mount] = [
        one["mountPath"] for one in rendered.container("decode-0")["volumeMounts"] if one["name"] == "keys"
    ]
    environment = {one["name"]: one.get("value") for one in rendered.container("decode-0")["env"]}
    named = {environment["DUALPATH_KEY_FILE"], environment["DUALPATH_SCHEDULER_KEY_FILE"]}
    assert named <= {f"{mount}/{path}" for path in paths}
    assert {f"peers/{name}.key" for name in PEERS} <= paths and environment[
        "DUALPATH_PEER_KEYS"
    ] == f"{mount}/peers"


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
def test_kustomize_builds_it_with_the_keys_beside_it(tmp_path, keys):
    description = tmp_path / "cluster.yaml"
    description.write_text(yaml.safe_dump(described(security={"keys": str(keys)})))
    out = tmp_path / "out"
    result = CliRunner().invoke(render_app, ["kubernetes", str(description), "--out", str(out)])
    assert result.exit_code == 0 and f"cp -r {keys} {out}/keys" in result.output
    assert (out / ".gitignore").read_text() == "keys/\n"
    assert not list(out.rglob("*.key_secret")), "the command copies no secret"
    shutil.copytree(keys, out / "keys")
    built = subprocess.run(["kubectl", "kustomize", str(out)], capture_output=True, text=True, check=True)
    objects = list(yaml.safe_load_all(built.stdout))
    assert {one["metadata"].get("namespace", "agents") for one in objects} == {"agents"}
    secrets = {one["metadata"]["name"] for one in objects if one["kind"] == "Secret"}
    [engine] = [
        one for one in objects if (one["kind"], one["metadata"]["name"]) == ("StatefulSet", "decode-0")
    ]
    [volume] = [one for one in engine["spec"]["template"]["spec"]["volumes"] if one["name"] == "keys"]
    assert volume["projected"]["sources"][0]["secret"]["name"] in secrets


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"security": None}, "kubernetes: other pods can reach every part, and nothing says who may"),
        ({"kubernetes": {"pod_network": None}}, "kubernetes.pod_network must be given with router.kind placing"),
        ({"kubernetes": {"pod_network": "10.0.0.1/8"}}, "kubernetes.pod_network: got '10.0.0.1/8'; is no IPv4 network"),
        ({"kubernetes": {"rdma": {"device_path": "/dev/x"}}}, "kubernetes.rdma: give either resource"),
        ({"kubernetes": {"imag": "x"}}, "kubernetes.imag: unknown field; did you mean 'image'?"),
        ({"hosts": {"a": {"compute": "10.0.0.1", "gpus": 64}}}, "kubernetes gives every pod an address; leave out hosts"),
        ({"model": {"kind": "tiny", "path": None}}, "model.path: unknown field"),
    ],
)  # fmt: skip
def test_a_description_that_pods_cannot_run_is_refused_with_the_remedy(tmp_path, changes, words):
    if "rdma" in (inner := changes.get("kubernetes") or {}):
        inner["rdma"] = {"resource": "rdma/hca", **inner["rdma"]}
    with pytest.raises(ConfigError) as refused:
        loaded(tmp_path, **changes)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mode": "auto"}, "mode: got 'auto'"),
        ({"kubernetes": {"rdma": None}}, "kubernetes.rdma: must be given with transport rdma"),
        (
            {"tracing": {"otlp_endpoint": "https://jaeger:4318"}},
            "tracing: pods send spans to a plain OTLP/gRPC receiver",
        ),
    ],
)
def test_what_only_the_rendering_needs_is_asked_for_by_it(tmp_path, changes, words):
    with pytest.raises(ConfigError) as refused:
        Rendered(loaded(tmp_path, **changes))
    assert words in str(refused.value)
