"""Clusters on several hosts: what a description may say, and where each part ends up."""

import urllib.request

import pytest
from cluster_on_hosts import HOSTS, loaded, on_hosts

from dualpath_sgl.launch.config.cluster import ConfigError
from dualpath_sgl.launch.plan.fixed import host_plan
from dualpath_sgl.launch.processes.ports import FreePorts
from dualpath_sgl.launch.processes.run_dir import read_state
from dualpath_sgl.launch.supervision.cluster import Cluster
from dualpath_sgl.launch.supervision.host_part import HostPart

GPU1, GPU2, MEM1 = (HOSTS["hosts"][name] for name in ("gpu1", "gpu2", "mem1"))
ROLES = {name: HOSTS[name] for name in ("prefill", "decode", "store", "scheduler", "security")}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prefill": {"tp_size": 4, "hosts": ["gpu9"]}}, "prefill.hosts names 'gpu9', which is no host; choose one of gpu1, gpu2"),
        ({"scheduler": {"host": "gpu9"}}, "scheduler.host names 'gpu9', which is no host"),
        ({"hosts": None, "model": {"kind": "tiny"}}, "names host 'gpu1', but there is no section hosts; add it, or remove this"),
        ({"hosts": {}}, "hosts: Dictionary should have at least 1 item"),
        (
            {"prefill": {"count": 3, "tp_size": 4, "hosts": ["gpu1"]}, "decode": {"tp_size": 4}},
            "prefill-2 needs 4 GPUs on one host; left are: gpu1 0; give prefill.hosts more",
        ),
        (
            {"hosts": {"gpu1": GPU1 | {"gpus": 1}, "gpu2": GPU2, "mem1": MEM1}},
            "prefill-0 needs 4 GPUs on one host; left are: gpu1 1",
        ),
        (
            {"hosts": {"gpu1": GPU1, "gpu2": GPU2 | {"compute": "10.2.0.1"}, "mem1": MEM1}},
            "two of hosts have the same compute address",
        ),
        ({"hosts": {"gpu1": {"compute": "10.2.0.300"}}}, "hosts.gpu1.compute: got '10.2.0.300'; is neither an address"),
        ({"hosts": {"gpu1": {"compte": "10.2.0.3"}}}, "hosts.gpu1.compte: unknown field; did you mean 'compute'?"),
        ({"host": "127.0.0.2"}, "host is '127.0.0.2', and hosts gives every part's address; leave host out"),
        ({"network": {"storage_rate": None}}, "network makes links on this machine, and hosts names several"),
        ({"model": {"kind": "directory", "path": "models"}}, "model.path is 'models', which means another directory"),
        ({"security": {"keys": "keys"}}, "security.keys is 'keys', which means another directory on each host"),
        ({"security": None}, "hosts.gpu1.compute is '10.2.0.1', which other hosts can reach, and nothing says who may"),
        ({"mode": "relay", "relays": {"count": 3}}, "relays.count is 3 with 2 decode engines; say in relays.hosts"),
        ({"ports": {"router": 80}}, "ports.router: got 80; input should be greater than or equal to 1024"),
    ],
)  # fmt: skip
def test_a_description_that_does_not_fit_its_hosts_is_refused_with_the_remedy(tmp_path, changes, words):
    with pytest.raises(ConfigError) as refused:
        loaded(tmp_path, **changes)
    assert words in str(refused.value)


def test_each_part_is_where_the_description_puts_it(tmp_path):
    plan = on_hosts(tmp_path, mode="relay", relays={"count": 3, "hosts": ["gpu1"]}, router={"host": "gpu1"})
    assert {name: process.place for name, process in plan.items()} == {
        "master": "mem1", "collector": "mem1", "scheduler": "mem1", "store": "mem1",
        "relay-0": "gpu2", "relay-1": "gpu2", "relay-2": "gpu1",
        "prefill-0": "gpu1", "prefill-1": "gpu1", "decode-0": "gpu2", "decode-1": "gpu2",
        "router": "gpu1",
    }  # fmt: skip


def test_without_a_word_engines_fill_the_hosts_with_gpus_and_the_rest_is_on_the_first_one(tmp_path):
    alone = {"count": 2, "tp_size": 4}
    plan = on_hosts(tmp_path, prefill=alone, decode=alone, store={}, scheduler={})
    places = {name: process.place for name, process in plan.items()}
    assert [places[f"prefill-{n}"] for n in range(2)] == ["gpu1", "gpu1"]
    assert [places[f"decode-{n}"] for n in range(2)] == ["gpu2", "gpu2"]
    assert {places[name] for name in ("master", "store", "scheduler", "collector", "router")} == {"gpu1"}


def test_on_cpus_engines_take_turns(tmp_path):
    group = {"count": 3, "hosts": ["gpu1", "gpu2"]}
    plan = on_hosts(tmp_path, device="cpu", prefill=group, decode=group, transport={})
    assert [plan[f"prefill-{n}"].place for n in range(3)] == ["gpu1", "gpu2", "gpu1"]


def test_gpus_are_counted_on_each_host(tmp_path):
    plan = on_hosts(tmp_path)
    assert not any(part.startswith("--base-gpu-id") for part in plan["decode-0"].argv)
    assert "--base-gpu-id=4" in plan["prefill-1"].argv and "--base-gpu-id=4" in plan["decode-1"].argv


def test_storage_and_compute_traffic_use_their_own_addresses_and_devices(tmp_path):
    plan = on_hosts(tmp_path)
    decode = plan["decode-0"].env
    assert (decode["DUALPATH_HOST"], decode["MOONCAKE_LOCAL_HOSTNAME"]) == ("10.2.0.2", "10.1.0.2")
    assert (decode["MOONCAKE_MASTER"], decode["MOONCAKE_DEVICE"]) == ("10.1.0.9:50051", "mlx5_1")
    assert "DUALPATH_DEVICE" not in decode
    assert plan["prefill-0"].env["DUALPATH_DEVICE"] == "mlx5_0"
    assert "--disaggregation-ib-device=mlx5_0" in plan["prefill-0"].argv
    assert {"--host=10.1.0.9", "--device=mlx5_9"} <= set(plan["store"].argv)


def test_several_store_nodes_have_names_of_their_own_and_the_master_is_with_the_first(tmp_path):
    plan = on_hosts(tmp_path, store={"hosts": ["mem1", "gpu2"]})
    assert (plan["store-0"].place, plan["store-1"].place, plan["master"].place) == ("mem1", "gpu2", "mem1")
    assert {"--host=10.1.0.2", "--master=10.1.0.9:50051"} <= set(plan["store-1"].argv)
    assert {"store-0", "store-1"} <= set(plan["decode-0"].after)


def test_no_two_processes_of_a_host_are_given_the_same_port(tmp_path):
    plan = on_hosts(
        tmp_path,
        device="cpu",
        transport={},
        mode="relay",
        relays={"count": 4, "hosts": ["gpu2"]},
        prefill={"count": 8, "tp_size": 2, "hosts": ["gpu2"]},
        decode={"count": 3, "tp_size": 2, "hosts": ["gpu2"]},
        store={"hosts": ["gpu2"]},
        scheduler={"host": "gpu2"},
    )
    taken = [
        number
        for process in plan.values()
        for port in process.ports
        if port.last - port.first < 100  # not what Mooncake and SGLang draw from
        for number in range(port.first, port.last + 1)
    ]
    assert len(set(taken)) == len(taken) > 30


def test_every_port_is_fixed_by_the_description(tmp_path):
    moved = {"master": 1111, "scheduler": 1112, "router": 1113, "engines": 30000, "relays": 2000}
    plan = on_hosts(tmp_path, ports=moved, mode="decode-side", relays={"count": 1})
    firsts = {f"{name}.{port.name}": port.first for name, process in plan.items() for port in process.ports}
    assert firsts["master.rpc"] == 1111 and firsts["scheduler.zmq"] == 1112 and firsts["router.http"] == 1113
    assert firsts["decode-1.http"] == 30300 and firsts["decode-1.pages"] == 30400
    assert (firsts["relay-0.relay"], firsts["relay-0.metrics"]) == (2000, 2001)
    assert plan["decode-1"].env["DUALPATH_PAGE_PORT"] == "30400"
    assert "--nccl-port=30302" in plan["decode-1"].argv


def test_a_mode_that_each_engine_would_choose_for_itself_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="mode: got 'auto'; the same flags must go to every host"):
        on_hosts(tmp_path, mode="auto")


def test_a_description_of_one_machine_cannot_be_planned_for_hosts(tmp_path):
    single = {"hosts": None, "prefill": {}, "decode": {}, "store": {}, "scheduler": {}}
    config = loaded(tmp_path, **single, device="cpu", model={"kind": "tiny"})
    with pytest.raises(ConfigError, match="hosts: must be given"):
        host_plan(config, tmp_path / "spans", "/usr/bin")


def test_up_on_this_machine_says_how_each_host_s_part_is_started(tmp_path):
    with pytest.raises(
        ConfigError, match="hosts: names gpu1, gpu2, mem1; start each one's part: --host NAME"
    ):
        Cluster(loaded(tmp_path, device="cpu", model={"kind": "tiny"}), tmp_path / "run")


def test_a_host_that_is_not_there_or_idle_is_refused(tmp_path):
    config = loaded(tmp_path, hosts=HOSTS["hosts"] | {"spare": {"compute": "10.2.0.7"}})
    with pytest.raises(ConfigError, match="--host gpu9 is none of hosts: gpu1, gpu2, mem1, spare"):
        HostPart(config, "gpu9", tmp_path / "run")
    with pytest.raises(ConfigError, match="--host spare has nothing to run"):
        HostPart(config, "spare", tmp_path / "run")


def test_up_on_a_host_starts_what_that_host_has_and_nothing_else(tmp_path):
    free = FreePorts("127.0.0.2")
    shared = ("master", "master_metrics", "scheduler", "scheduler_metrics", "collector")
    ports = {name: free.take() for name in shared}
    config = loaded(
        tmp_path,
        device="cpu",
        model={"kind": "tiny"},
        transport={},
        hosts={"front": {"compute": "127.0.0.1"}, "back": {"compute": "127.0.0.2"}},
        prefill={"hosts": ["front"]},
        decode={"hosts": ["front"]},
        store={"hosts": ["back"], "segment_bytes": 16 << 20},
        scheduler={"host": "back"},
        router={"host": "front"},
        ports=ports,
        security=None,
    )
    run_dir = tmp_path / "run"
    with HostPart(config, "back", run_dir) as part:
        assert set(part.processes) == {"master", "collector", "scheduler", "store"}
        told = read_state(run_dir)
        assert told is not None and set(told.processes) == set(part.processes)
        assert told.scheduler == f"tcp://127.0.0.2:{ports['scheduler']}"
        assert told.engines == {"prefill-0": "http://127.0.0.1:20000", "decode-0": "http://127.0.0.1:20300"}
        health = f"http://127.0.0.2:{ports['scheduler_metrics']}/healthz"
        with urllib.request.urlopen(health, timeout=60) as answer:
            assert answer.status == 200
    assert read_state(run_dir) is None
