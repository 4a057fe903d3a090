"""The plan of a cluster: which processes, in which order, and what a backend is told of each."""

import signal
from pathlib import Path

import pytest

from dualpath_sgl.launch.config.addresses import on_one_host
from dualpath_sgl.launch.config.cluster import ClusterConfig
from dualpath_sgl.launch.config.security import Security
from dualpath_sgl.launch.plan.process import Answers, Listens, Part, Process, Says
from dualpath_sgl.launch.plan.site import Site, draw
from dualpath_sgl.launch.plan.whole import make_plan

MODEL = {
    "kind": "tiny", "layers": 1, "hidden": 16, "heads": 2, "kv_heads": 1, "head_dim": 8, "context_length": 256,
}  # fmt: skip


def planned(base: dict[str, str] | None = None, keys: Path | None = None, **fields) -> dict[str, Process]:
    every = {"name": "t", "device": "cpu", "mode": "decode-side", "model": MODEL} | fields
    config = ClusterConfig.model_validate(every)
    if keys is not None:
        security = Security.model_construct(keys=keys, trusted_network=False)
        config = config.model_copy(update={"security": security})
    drawn = draw(config)
    where = on_one_host("127.0.0.1")
    site = Site(where, drawn.ports, drawn.engines, drawn.relays, Path("/run/spans"), base or {})
    return {process.name: process for process in make_plan(config, site)}


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({}, "master collector scheduler store prefill-0 decode-0 router"),
        ({"mode": "basic"}, "master collector store prefill-0 decode-0 router"),
        ({"tracing": {"enabled": False}}, "master scheduler store prefill-0 decode-0 router"),
        (
            {"mode": "relay", "decode": {"count": 2}},
            "master collector scheduler store relay-0 relay-1 prefill-0 decode-0 decode-1 router",
        ),
    ],
)
def test_the_file_says_which_processes_there_are_in_the_order_of_starting(fields, names):
    assert list(planned(**fields)) == names.split()


@pytest.mark.parametrize("mode", ["basic", "decode-side", "relay"])
def test_nobody_waits_for_a_process_that_starts_later(mode):
    seen: set[str] = set()
    for process in planned(mode=mode).values():
        assert set(process.after) <= seen
        seen.add(process.name)


def test_engines_and_relays_wait_for_all_that_they_call_at_their_start():
    plan = planned(mode="relay")
    for name in ("prefill-0", "decode-0", "relay-0"):
        assert set(plan[name].after) == {"store", "collector", "scheduler"}
    assert plan["store"].after == ("master",)


def test_every_port_of_an_option_is_among_the_ports_of_its_process():
    plan = planned(mode="relay", router={"kind": "rust"})
    options = {
        "master": ("--rpc_port", "--metrics_port"),
        "collector": ("--port",),
        "scheduler": ("--metrics-port",),
        "prefill-0": ("--port", "--disaggregation-bootstrap-port"),
        "decode-0": ("--port",),
        "router": ("--port", "--prometheus-port"),
    }
    for name, wanted in options.items():
        given = dict(part.split("=", 1) for part in plan[name].argv if part.startswith("--") and "=" in part)
        named = {port.first for port in plan[name].ports if port.first == port.last}
        assert {int(given[option]) for option in wanted} <= named


def test_each_part_says_how_it_is_ready():
    plan = planned(mode="relay")
    kinds = {name: type(process.ready) for name, process in plan.items()}
    assert kinds.pop("master") is kinds.pop("collector") is Listens
    assert kinds.pop("store") is Says
    assert set(kinds.values()) == {Answers}
    assert plan["scheduler"].ready.path == "/healthz"


def test_each_process_reads_its_own_secret_and_nobody_else_s(tmp_path):
    plan = planned(keys=tmp_path, mode="relay", router={"kind": "placing"})
    assert plan["scheduler"].secrets == ("scheduler.key_secret", "peers")
    assert plan["router"].secrets == ("peers/router.key_secret", "scheduler.key")
    for name in ("prefill-0", "decode-0", "relay-0"):
        assert plan[name].secrets == (f"peers/{name}.key_secret", "scheduler.key", "peers")
    assert plan["master"].secrets == plan["store"].secrets == plan["collector"].secrets == ()


def test_without_keys_nobody_reads_any():
    assert all(process.secrets == () for process in planned().values())


def test_resources_are_what_the_file_says():
    plan = planned(device="cuda", prefill={"tp_size": 2, "host_pool": {"size_gb": 3}}, decode={"tp_size": 2})
    assert (plan["prefill-0"].resources.gpus, plan["prefill-0"].resources.memory_bytes) == (2, 6 * 10**9)
    assert plan["decode-0"].resources.memory_bytes is None, "SGLang decides"
    assert plan["store"].resources.memory_bytes == 1 << 30
    assert not plan["prefill-0"].resources.rdma
    assert planned(transport={"storage": "rdma"})["store"].resources.rdma


def test_engines_drain_on_gpus_and_end_at_once_on_a_cpu():
    stops = {device: planned(device=device)["decode-0"].stop for device in ("cpu", "cuda")}
    assert stops == {"cpu": signal.SIGINT, "cuda": signal.SIGTERM}


def test_a_relay_lives_where_its_decode_engine_does():
    plan = planned(mode="relay", decode={"count": 1}, relays={"count": 2})
    assert [plan[name].place for name in ("relay-0", "relay-1")] == ["decode-0", "relay-1"]


def test_the_environment_is_whole_and_free_of_what_was_exported_by_chance():
    plan = planned({"PATH": "/bin", "MC_FORCE_TCP": "1"})
    for process in plan.values():
        assert process.env["PATH"] == "/bin" and "MC_FORCE_TCP" not in process.env
    assert {process.part for process in plan.values()} >= {Part.PREFILL, Part.DECODE}
