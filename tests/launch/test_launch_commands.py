"""Command lines: what each mode starts, and what must never leak."""

import json
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dualpath_sgl.launch import cli
from dualpath_sgl.launch.config import CLUSTERS
from dualpath_sgl.launch.config.addresses import Addresses, on_network, on_one_host
from dualpath_sgl.launch.config.cluster import ClusterConfig
from dualpath_sgl.launch.config.otlp import HEADERS_VARIABLE
from dualpath_sgl.launch.plan.site import Site
from dualpath_sgl.launch.plan.targets import targets
from dualpath_sgl.launch.processes.commands import (
    EngineSpec,
    Ports,
    collector_command,
    collector_environment,
    engine_command,
    engine_environment,
    engine_specs,
    master_command,
    router_command,
    scheduler_command,
    scheduler_url,
    single_server_command,
    store_command,
)
from dualpath_sgl.launch.processes.relays import RelaySpec, relay_environment, relay_specs
from dualpath_sgl.launch.topology.plan import Rates, make_plan
from dualpath_sgl.relay import settings as relay_settings

HERE = on_one_host("127.0.0.1")
PORTS = Ports(
    master=1, master_metrics=2, scheduler=3, scheduler_metrics=7, collector=4, router=5, router_metrics=6
)
MODEL = {
    "kind": "tiny",
    "layers": 1,
    "hidden": 16,
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 8,
    "context_length": 256,
}


def cluster(**fields) -> ClusterConfig:
    return ClusterConfig.model_validate(
        {"name": "t", "device": "cpu", "mode": "decode-side", "model": MODEL} | fields
    )


def commands(config: ClusterConfig) -> dict[str, str]:
    ports = iter(range(100, 200))
    specs = engine_specs(config, lambda: next(ports))
    return {spec.name: " ".join(engine_command(config, HERE, spec, PORTS)) for spec in specs}


def environment(config: ClusterConfig, base: dict[str, str], engine: str = "prefill-0") -> dict[str, str]:
    spec = next(spec for spec in engine_specs(config, lambda: 7) if spec.name == engine)
    return engine_environment(config, HERE, spec, PORTS, base)


def test_engines_are_named_by_role_and_number():
    config = cluster(prefill={"count": 2}, decode={"count": 1})
    assert list(commands(config)) == ["prefill-0", "prefill-1", "decode-0"]


@pytest.mark.parametrize(
    ("mode", "decode_cache"),
    [("basic", False), ("relay", False), ("both", True), ("decode-side", True)],
)
def test_the_mode_decides_who_reads_the_store(mode, decode_cache):
    made = commands(cluster(mode=mode))
    assert "--hicache-storage-backend=mooncake " in made["prefill-0"]
    assert ("--enable-hierarchical-cache" in made["decode-0"]) is decode_cache
    assert ("--disaggregation-decode-enable-radix-cache" in made["decode-0"]) is decode_cache


def extra_config(command: list[str]) -> dict:
    flag = "--hicache-storage-backend-extra-config="
    return json.loads(next(part for part in command if part.startswith(flag)).removeprefix(flag))


@pytest.mark.parametrize("mode", ["decode-side", "relay"])
def test_dualpath_s_backend_stands_under_sglang_s_name_and_may_be_asked_for_one_page(mode):
    config = cluster(page_size=32, mode=mode)
    command = engine_command(config, HERE, engine_specs(config, lambda: 7)[0], PORTS)
    assert "--hicache-storage-backend=mooncake" in command
    extra = extra_config(command)
    assert extra["prefetch_threshold"] == 32 and "module_path" not in extra


@pytest.mark.parametrize(
    ("mode", "backend"),
    [("basic", "LimitedStore"), ("both", "LimitedStore"), ("decode-side", None), ("relay", None)],
)
def test_a_read_rate_limits_every_mode_alike(mode, backend):
    config = cluster(mode=mode, store={"read_rate": "80mbit"})
    command = engine_command(config, HERE, engine_specs(config, lambda: 7)[0], PORTS)
    extra = extra_config(command)
    assert ("--hicache-storage-backend=dynamic" in command) is (backend is not None)
    assert (extra.get("class_name"), extra["read_rate_bytes_per_s"]) == (backend, 10_000_000)


@pytest.mark.parametrize("mode", ["decode-side", "relay"])
def test_only_modes_of_dualpath_switch_it_on(mode):
    inherited = {"DUALPATH_ENABLED": "1", "PATH": "/bin"}
    assert "DUALPATH_ENABLED" not in environment(cluster(mode="basic"), inherited)
    found = environment(cluster(mode=mode), inherited)
    assert (found["DUALPATH_ENABLED"], found["DUALPATH_MODE"], found["PATH"]) == ("1", mode, "/bin")
    assert found["DUALPATH_ENGINE_ID"] == "prefill-0"


def test_sglang_s_own_transport_is_the_file_s():
    assert "--disaggregation-transfer-backend=nixl" in commands(cluster(transport={"pd": "nixl"}))["decode-0"]
    assert "--disaggregation-transfer-backend=mooncake_tcp" in commands(cluster())["prefill-0"]


@pytest.mark.parametrize("asked", [{"storage": "rdma"}, {"compute": "rdma"}, {"pd": "rdma"}])
def test_with_rdma_anywhere_nothing_makes_sglang_force_tcp_on_the_whole_process(asked):
    flags = commands(cluster(transport=asked))
    assert all("--disaggregation-transfer-backend=mooncake " in flags[name] for name in flags)


def test_every_kind_of_bytes_has_its_own_transport():
    config = cluster(transport={"storage": "rdma", "pd": "nixl"}, relays={"count": 1})
    own = environment(config, {})
    assert (own["MOONCAKE_PROTOCOL"], own["DUALPATH_PROTOCOL"]) == ("rdma", "tcp")
    assert "--protocol=rdma" in store_command(config, HERE, PORTS)
    spec = relay_specs(config, lambda: 7)[0]
    relay = relay_environment(config, HERE, spec, "m:1", "http://c", "tcp://s:1", {})
    told = relay["DUALPATH_RELAY_STORAGE_PROTOCOL"], relay["DUALPATH_RELAY_PROTOCOL"]
    assert told == ("rdma", "tcp")


def test_engines_own_no_memory_of_the_store_unless_their_group_says_so():
    assert (
        environment(cluster(), {"MOONCAKE_GLOBAL_SEGMENT_SIZE": "4gb"})["MOONCAKE_GLOBAL_SEGMENT_SIZE"] == "0"
    )
    owner = cluster(prefill={"env": {"MOONCAKE_GLOBAL_SEGMENT_SIZE": "16777216"}})
    assert environment(owner, {})["MOONCAKE_GLOBAL_SEGMENT_SIZE"] == "16777216"


def test_ranks_on_a_cpu_are_bound_one_core_each():
    config = cluster(prefill={"tp_size": 2}, decode={"tp_size": 2})
    assert environment(config, {})["SGLANG_CPU_OMP_THREADS_BIND"] == "0|1"


def test_gpu_engines_take_disjoint_gpus():
    config = cluster(device="cuda", prefill={"tp_size": 2}, decode={"tp_size": 2, "count": 2})
    made = commands(config)
    assert "--base-gpu-id" not in made["prefill-0"]
    assert "--base-gpu-id=2" in made["decode-0"] and "--base-gpu-id=4" in made["decode-1"]


def test_a_share_of_requests_is_traced_by_opentelemetrys_own_sampler_and_tokens_are_not():
    whole, part = (environment(cluster(tracing={"sample_ratio": ratio}), {}) for ratio in (1, 0.25))
    assert whole["SGLANG_TRACE_LEVEL"] == "2" and "OTEL_TRACES_SAMPLER" not in whole
    assert part["OTEL_TRACES_SAMPLER"] == "parentbased_traceidratio"
    assert float(part["OTEL_TRACES_SAMPLER_ARG"]) == 0.25


def test_a_copy_of_spans_goes_where_the_file_says_and_a_token_is_on_no_command_line(tmp_path):
    ca_file = tmp_path / "ca.pem"
    ca_file.touch()
    tracing = {
        "otlp_endpoint": "grpcs://h:1",
        "otlp_headers": {"token": "secret"},
        "otlp_ca_file": str(ca_file),
    }
    config = cluster(tracing=tracing)
    argv = collector_command(config, HERE, PORTS, tmp_path / "spans.jsonl")
    assert {"--forward=grpcs://h:1", f"--forward-ca={ca_file}"} <= set(argv)
    assert "secret" not in " ".join(argv)
    assert json.loads(collector_environment(config, {})[HEADERS_VARIABLE]) == {"token": "secret"}
    assert collector_environment(cluster(), {"A": "b"}) == {"A": "b"}


def test_tracing_off_starts_no_exporter():
    assert "--enable-trace" not in " ".join(commands(cluster(tracing={"enabled": False})).values())
    assert "--otlp-traces-endpoint=127.0.0.1:4 " in commands(cluster())["decode-0"]


def test_the_reference_server_has_neither_pd_nor_hicache():
    command = " ".join(single_server_command(cluster(), 9))
    assert "--disaggregation" not in command and "hicache" not in command and "hierarchical" not in command


def shaped(config: ClusterConfig) -> tuple[Addresses, list[EngineSpec]]:
    ports = iter(range(100, 200))
    specs = engine_specs(config, lambda: next(ports))
    plan = make_plan(3, [spec.name for spec in specs], Rates(1, 1))
    return on_network(plan), specs


def test_on_a_shaped_network_the_store_client_and_everything_else_use_different_addresses():
    config = cluster()
    addresses, specs = shaped(config)
    decode = specs[-1]
    found = engine_environment(config, addresses, decode, PORTS, {})
    assert found["MOONCAKE_LOCAL_HOSTNAME"] == "10.77.3.3"
    assert found["MOONCAKE_MASTER"] == "10.77.3.1:1"
    assert (found["SGLANG_HOST_IP"], found["SGLANG_LOCAL_IP_NIC"]) == ("10.78.3.3", "c0")
    assert found["DUALPATH_HOST"] == "10.78.3.3"
    assert found["DUALPATH_SCHEDULER"] == "tcp://10.78.3.254:3"
    assert "--host=10.78.3.3" in engine_command(config, addresses, decode, PORTS)


def test_on_a_shaped_network_router_and_scheduler_are_at_the_hosts_end():
    config = cluster()
    addresses, specs = shaped(config)
    router = router_command(config, addresses, PORTS, specs)
    assert "--host=10.78.3.254" in router and specs[0].url(addresses) in router
    assert specs[0].url(addresses).startswith("http://10.78.3.2:")
    assert "--rpc_address=10.77.3.1" in master_command(addresses, PORTS)


def test_the_scheduler_binds_beyond_loopback_only_where_the_cluster_is_not_on_it():
    config = cluster()
    addresses, _ = shaped(config)
    assert "--insecure-bind" in scheduler_command(config, addresses, PORTS)
    assert "--insecure-bind" not in scheduler_command(config, HERE, PORTS)


def test_servers_do_not_close_the_connections_that_the_router_keeps():
    assert int(environment(cluster(), {})["SGLANG_TIMEOUT_KEEP_ALIVE"]) >= 600


def test_decode_engines_notice_a_prefill_engine_that_is_replaced_within_seconds():
    interval = "SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL"
    assert float(environment(cluster(), {})[interval]) == 2
    asked = cluster(decode={"count": 1, "env": {interval: "7"}})
    assert environment(asked, {}, "decode-0")[interval] == "7"


def router(config: ClusterConfig) -> str:
    ports = iter(range(100, 200))
    specs = engine_specs(config, lambda: next(ports))
    return " ".join(router_command(config, HERE, PORTS, specs))


def test_a_placing_router_asks_the_clusters_scheduler_and_exports_spans():
    made = router(cluster())
    assert "--mini-lb --dualpath-scheduler=tcp://127.0.0.1:3 " in made
    assert "--enable-trace --otlp-traces-endpoint=127.0.0.1:4" in made
    untraced = cluster(tracing={"enabled": False})
    assert "--enable-trace" not in router(untraced)


@pytest.mark.parametrize("fields", [{"router": {"kind": "rust"}}, {"mode": "basic"}, {"mode": "both"}])
def test_the_rust_router_serves_where_it_is_named_and_wherever_there_is_no_scheduler(fields):
    made = router(cluster(**fields))
    assert "--mini-lb" not in made and "--policy=round_robin" in made


def test_the_scheduler_is_told_both_policies():
    made = scheduler_command(cluster(scheduler={"policy": "decode", "placement": "paper"}), HERE, PORTS)
    assert "--policy=decode" in made and "--placement=paper" in made


# -- relays --------------------------------------------------------------------------------------


def relays(config: ClusterConfig) -> list[RelaySpec]:
    ports = iter(range(200, 300))
    return relay_specs(config, lambda: next(ports))


def relay(config: ClusterConfig, number: int = 0, addresses: Addresses = HERE) -> dict[str, str]:
    return relay_environment(
        config, addresses, relays(config)[number], "store:1", "http://hub:4", "tcp://127.0.0.1:3", {}
    )


def test_each_decode_engine_has_a_relay_in_mode_relay_and_none_in_the_others():
    assert [spec.host for spec in relays(cluster(mode="relay", decode={"count": 2}))] == [
        "decode-0",
        "decode-1",
    ]
    assert relays(cluster(mode="basic")) == relays(cluster(mode="relay", relays={"count": 0})) == []
    assert relays(cluster(mode="decode-side")) == []


@pytest.mark.parametrize("mode", ["decode-side", "relay"])
def test_no_flag_names_relays_for_the_scheduler_tells_of_them(mode):
    config = cluster(mode=mode, relays={"count": 1})
    prefill = engine_command(config, HERE, engine_specs(config, lambda: 7)[0], PORTS)
    assert "relays" not in extra_config(prefill)["relay"]
    assert relay(config)["DUALPATH_RELAY_SCHEDULER"]


def test_relays_beyond_the_decode_engines_have_links_of_their_own():
    config = cluster(mode="relay", relays={"count": 2})
    assert [(spec.name, spec.host) for spec in relays(config)] == [
        ("relay-0", "decode-0"),
        ("relay-1", "relay-1"),
    ]
    plan = make_plan(3, ["prefill-0", "decode-0", "relay-1"], Rates(1, 1))
    for number, host in enumerate(("decode-0", "relay-1")):
        found = relay(config, number, on_network(plan))
        assert found["DUALPATH_RELAY_HOST"] == plan.link(host, "compute").address
        assert found["DUALPATH_RELAY_STORAGE_HOST"] == plan.link(host, "storage").address


def test_engines_and_relays_know_the_scheduler_and_no_flag_names_a_relay():
    config = cluster(mode="relay", decode={"tp_size": 2})
    engines = {spec.name: spec for spec in engine_specs(config, lambda: 7)}
    command = engine_command(config, HERE, engines["prefill-0"], PORTS)
    assert "--hicache-storage-backend=mooncake" in command
    assert not [part for part in command if "relay-0" in part]
    plain = engine_command(config, HERE, engines["decode-0"], PORTS)
    assert not [part for part in plain if "hicache-storage" in part or "hierarchical" in part]
    for name in ("prefill-0", "decode-0"):
        found = environment(config, {}, name)
        assert found["DUALPATH_MODE"] == "relay" and found["DUALPATH_ENGINE_ID"] == name
        assert found["DUALPATH_SCHEDULER"] == scheduler_url(HERE, PORTS)
    assert relay(config)["DUALPATH_RELAY_SCHEDULER"] == "tcp://127.0.0.1:3"


def test_the_placing_router_asks_the_scheduler_in_mode_relay_too():
    config = cluster(mode="relay", router={"kind": "placing"})
    assert f"--dualpath-scheduler={scheduler_url(HERE, PORTS)}" in router_command(
        config, HERE, PORTS, engine_specs(config, lambda: 7)
    )


def test_a_read_rate_limits_relays_as_it_does_engines():
    config = cluster(
        mode="relay", store={"read_rate": "80mbit"}, relays={"env": {"DUALPATH_RELAY_LEASE_S": "9"}}
    )
    found = relay(config)
    assert found["DUALPATH_RELAY_READ_RATE_BYTES_PER_S"] == "10000000"
    assert (found["DUALPATH_RELAY_MASTER"], found["DUALPATH_RELAY_LEASE_S"]) == ("store:1", "9")
    assert found["DUALPATH_RELAY_OTLP_ENDPOINT"] == "http://hub:4"
    command = engine_command(config, HERE, engine_specs(config, lambda: 7)[0], PORTS)
    assert any('"read_rate_bytes_per_s": 10000000' in part for part in command)


def test_a_relay_can_start_with_what_it_is_given(monkeypatch):
    config = cluster(mode="relay", host="10.1.2.3", security={"trusted_network": True})
    for name, value in relay(config, addresses=on_one_host("10.1.2.3")).items():
        monkeypatch.setenv(name, value)
    assert relay_settings.load().trusted_network


def test_up_says_once_whether_anybody_takes_the_traces():
    with socket.create_server(("127.0.0.1", 0)) as receiver:
        there = f"127.0.0.1:{receiver.getsockname()[1]}"
        assert cli._traces(there) == f"traces  {there}"
    assert cli._traces(f"http://{there}").startswith(f"traces  nothing listens at {there}")


def test_a_mistaken_otlp_endpoint_ends_up_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = CLUSTERS / "cpu-1p1d.yaml"
    refused = CliRunner().invoke(cli.app, ["up", "-c", str(config), "--otlp", "jaeger:4318"])
    assert refused.exit_code == 1 and not (tmp_path / "runs").exists()
    assert "--otlp 'jaeger:4318'" in refused.output and "write http:// before it" in " ".join(
        refused.output.split()
    )


# -- who answers Prometheus ----------------------------------------------------------------------


def told_to_prometheus(**fields) -> dict[str, tuple[str, str]]:
    config = cluster(**fields)
    specs, relays = engine_specs(config, lambda: 17), relay_specs(config, iter((18, 19)).__next__)
    site = Site(HERE, PORTS, tuple(specs), tuple(relays), Path("spans"), {})
    found = targets(config, site)
    assert all(group["labels"]["cluster"] == "t" for group in found)
    return {group["labels"]["name"]: (group["labels"]["job"], *group["targets"]) for group in found}


def test_prometheus_is_told_of_every_part():
    assert told_to_prometheus(router={"kind": "placing"}, relays={"count": 1}) == {
        "prefill-0": ("dualpath-engine", "127.0.0.1:17"),
        "decode-0": ("dualpath-engine", "127.0.0.1:17"),
        "relay-0": ("dualpath-relay", "127.0.0.1:19"),
        "router": ("dualpath-router", "127.0.0.1:5"),
        "master": ("mooncake-master", "127.0.0.1:2"),
        "scheduler": ("dualpath-scheduler", "127.0.0.1:7"),
    }
    assert "--metrics-port=7" in scheduler_command(cluster(), HERE, PORTS)


def test_prometheus_finds_the_rust_router_s_own_port_and_no_scheduler_where_there_is_none():
    found = told_to_prometheus(mode="basic")
    assert found["router"] == ("dualpath-router", "127.0.0.1:6") and "scheduler" not in found
