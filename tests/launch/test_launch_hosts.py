"""The host of a cluster: what may stand there, what it means, and how it stands in addresses."""

import subprocess
import sys
from pathlib import Path

import pytest

from dualpath_sgl.launch.config.addresses import on_one_host
from dualpath_sgl.launch.config.cluster import (
    ClusterConfig,
    ConfigError,
    Router,
    RouterKind,
    at_its_address,
    load,
)
from dualpath_sgl.launch.config.hosts import local_address
from dualpath_sgl.launch.config.otlp import checked_otlp
from dualpath_sgl.launch.processes.commands import (
    Ports,
    engine_command,
    engine_environment,
    engine_specs,
    router_command,
)
from dualpath_sgl.launch.processes.ports import FreePorts
from dualpath_sgl.launch.supervision.cluster import Cluster
from dualpath_sgl.launch.supervision.single_server import SingleServer
from scheduler_svc.wire.addresses import authority

TINY = {"kind": "tiny", "layers": 1, "hidden": 16, "heads": 2, "kv_heads": 1, "head_dim": 8}
ELSEWHERE = "192.0.2.77"
"""Of the block that belongs to nobody."""


def described(tmp_path: Path, host: str) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(f"name: t\ndevice: cpu\nhost: {host!r}\nsecurity: {{trusted_network: true}}\n")
    return path


def cluster(host: str) -> ClusterConfig:
    fields = {"name": "t", "device": "cpu", "model": TINY, "host": host}
    return ClusterConfig.model_validate(
        fields | {"mode": "decode-side", "security": {"trusted_network": True}}
    )


@pytest.mark.parametrize(
    "host",
    ["", " ", "--help", "-h", "a b", "a/b", "http://h", "h:1", "[::1]", "h\n", "x" * 300, "a..b", "1.2.3",
     "127.0.0.1.1", "999.1.1.1", "224.0.0.1", "ff02::1", "fe80::1%eth0", "hôte", "*"],
)  # fmt: skip
def test_what_is_no_address_of_one_machine_is_refused_with_field_value_and_remedy(tmp_path, host):
    with pytest.raises(ConfigError, match=r"host: got .*; (is|cannot).*such as 127\.0\.0\.1"):
        load(described(tmp_path, host))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "node-1.example.org", "10.1.2.3", "a_b"])
def test_addresses_and_names_may_stand_in_a_description(tmp_path, host):
    assert load(described(tmp_path, host)).host == host


def test_a_name_means_its_address():
    assert at_its_address(cluster("localhost")).host == "127.0.0.1"
    assert at_its_address(cluster("127.0.0.2")).host == "127.0.0.2"


@pytest.mark.parametrize(
    ("host", "problem"),
    [
        (ELSEWHERE, "is no address of this machine; it has .*127.0.0.1"),
        ("nowhere.invalid", "does not resolve"),
    ],
)
@pytest.mark.parametrize("starts", [Cluster, SingleServer])
def test_a_host_of_another_machine_is_refused_before_anything_starts(tmp_path, host, problem, starts):
    with pytest.raises(ConfigError, match=f"host: got '{host}'; {problem}"):
        starts(cluster(host), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_up_says_in_one_sentence_that_the_host_is_elsewhere(tmp_path):
    path = described(tmp_path, ELSEWHERE)
    argv = [
        sys.executable,
        "-m",
        "dualpath_sgl.cli",
        "up",
        "-c",
        str(path),
        "--run-dir",
        str(tmp_path / "run"),
    ]
    result = subprocess.run(argv, capture_output=True, text=True)
    assert result.returncode == 1
    assert f"{path}: host: got '{ELSEWHERE}'; is no address of this machine" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_ipv6_address_stands_in_brackets_wherever_a_port_follows():
    config, addresses = cluster("::1"), on_one_host("::1")
    ports = Ports(*range(1, 8))
    drawn = iter(range(100, 110))
    specs = engine_specs(config, lambda: next(drawn))
    prefill = engine_command(config, addresses, specs[0], ports)
    assert {"--host=::1", "--otlp-traces-endpoint=[::1]:5"} <= set(prefill)
    environment = engine_environment(config, addresses, specs[0], ports, {})
    assert environment["DUALPATH_SCHEDULER"] == "tcp://[::1]:3"
    assert environment["DUALPATH_HOST"] == "::1"
    assert environment["MOONCAKE_MASTER"] == "[::1]:1"
    assert environment["MC_USE_IPV6"] == "1"
    upstream = config.model_copy(update={"router": Router(kind=RouterKind.RUST)})
    rust = set(router_command(upstream, addresses, ports, specs))
    assert {"http://[::1]:101", "http://[::1]:102", "--host=[::1]"} <= rust
    assert {"--host=::1", "--dualpath-scheduler=tcp://[::1]:3"} <= set(
        router_command(config, addresses, ports, specs)
    )
    assert authority("127.0.0.1", 5) == "127.0.0.1:5"


def test_ports_are_free_on_an_ipv6_address_too():
    assert FreePorts(local_address("::1")).take() > 0


@pytest.mark.parametrize("endpoint", ["localhost:4317", "127.0.0.1:1", "[::1]:65535", "jaeger.example:4317"])
def test_an_endpoint_is_a_host_and_a_port(endpoint):
    assert checked_otlp(endpoint) == endpoint


@pytest.mark.parametrize(
    "endpoint", ["h", "h:", ":1", "h:0", "h:65536", "h:1x", "::1:1", "[h]:1", "[::1]", "h:1\n"]
)
def test_what_is_no_endpoint_is_refused_with_an_example(endpoint):
    with pytest.raises(ValueError, match=r"give HOST:PORT or grpcs://HOST:PORT"):
        checked_otlp(endpoint)
