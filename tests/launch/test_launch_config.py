"""Cluster descriptions: what is accepted, and how refusals read."""

from pathlib import Path

import pytest
import yaml

from dualpath_sgl.launch.config.cluster import (
    ClusterConfig,
    ConfigError,
    Mode,
    bits_per_s,
    kv_bytes_per_token,
    load,
)

EXAMPLES = sorted((Path(__file__).parents[2] / "launch" / "clusters").glob("*.yaml"))


def write(tmp_path: Path, **fields) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump({"name": "test", "device": "cpu"} | fields))
    return path


def refusal(tmp_path: Path, **fields) -> str:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, **fields))
    return str(caught.value)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_shipped_example_loads_and_is_named_after_its_file(path):
    assert load(path).name == path.stem


def test_name_and_device_are_enough(tmp_path):
    config = load(write(tmp_path))
    assert config.mode is Mode.AUTO
    assert config.host == "127.0.0.1"


def test_a_misspelt_field_is_named_with_the_closest_known_one(tmp_path):
    assert "prefill.cuont: unknown field; did you mean 'count'?" in refusal(tmp_path, prefill={"cuont": 1})


def test_a_field_unlike_any_other_lists_the_known_ones(tmp_path):
    assert "router.zzz: unknown field; known fields: kind, policy" in refusal(tmp_path, router={"zzz": 1})


def test_a_number_out_of_range_is_named_with_its_value_and_bound(tmp_path):
    message = refusal(tmp_path, decode={"count": 0})
    assert "decode.count: got 0; input should be greater than or equal to 1" in message


def test_the_former_name_of_a_mode_names_the_new_one(tmp_path):
    assert "mode: got 'dualpath'; is now called decode-side" in refusal(tmp_path, mode="dualpath")


def test_the_former_name_of_the_transfer_names_the_new_one(tmp_path):
    message = refusal(tmp_path, transfer="mooncake")
    assert "transfer is now called transport.pd: tcp for mooncake_tcp, rdma for mooncake" in message


def test_tcp_that_would_switch_rdma_off_for_the_store_is_refused_with_the_ways_out(tmp_path):
    message = refusal(tmp_path, transport={"pd": "tcp", "storage": "rdma"})
    assert "transport: pd is tcp and storage rdma" in message and "give pd: rdma or pd: nixl" in message
    load(write(tmp_path, transport={"pd": "nixl", "storage": "rdma"}))


def test_an_unknown_mode_lists_the_modes(tmp_path):
    message = refusal(tmp_path, mode="fast")
    assert "mode: got 'fast'" in message and "'auto', 'decode-side', 'relay', 'basic' or 'both'" in message


def test_an_unknown_scheduler_policy_lists_the_policies(tmp_path):
    message = refusal(tmp_path, scheduler={"policy": "best"})
    assert (
        "scheduler.policy: got 'best'; choose one of prefill, decode, round_robin, shorter_queue" in message
    )


def test_a_model_field_is_reported_as_it_stands_in_the_file(tmp_path):
    assert "model.layers: got 0;" in refusal(tmp_path, model={"kind": "tiny", "layers": 0})


def test_a_model_directory_without_a_model_is_refused(tmp_path):
    message = refusal(tmp_path, model={"kind": "directory", "path": str(tmp_path)})
    assert "holds no config.json" in message and str(tmp_path) in message


def test_a_host_pool_needs_exactly_one_size(tmp_path):
    assert "exactly one of ratio and size_gb" in refusal(
        tmp_path, prefill={"host_pool": {"ratio": 2, "size_gb": 3}}
    )


def test_decode_side_loads_between_different_tp_sizes_are_refused_with_the_remedy(tmp_path):
    message = refusal(tmp_path, prefill={"tp_size": 2}, mode="decode-side")
    assert "decode.tp_size 1 differs from prefill.tp_size 2" in message and "make them equal" in message
    for mode in ("auto", "relay", "basic"):
        assert load(write(tmp_path, prefill={"tp_size": 2}, mode=mode)).prefill.tp_size == 2


def test_every_problem_of_a_file_is_reported_at_once(tmp_path):
    message = refusal(tmp_path, device="tpu", page_size=0)
    assert "device:" in message and "page_size:" in message


def test_a_missing_file_names_the_shipped_examples(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.yaml: No such file.*cpu-1p1d\.yaml"):
        load(tmp_path / "nowhere.yaml")


def test_text_that_is_no_yaml_mapping_is_refused(tmp_path):
    path = tmp_path / "cluster.yaml"
    for text, problem in (("a: [", "not YAML"), ("- a", "must be a mapping of fields, got list")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=problem):
            load(path)


def test_kv_bytes_per_token_count_keys_and_values_of_every_layer_and_head(tmp_path):
    config = ClusterConfig.model_validate(
        {"name": "t", "device": "cpu", "model": {"kind": "tiny", "layers": 3, "kv_heads": 4, "head_dim": 16}}
    )
    assert kv_bytes_per_token(config) == 2 * 3 * 4 * 16 * 4


def test_kv_bytes_per_token_of_an_mla_model_count_one_compressed_vector(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"num_hidden_layers": 2, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_attention_heads": 8}'
    )
    config = ClusterConfig.model_validate(
        {"name": "t", "device": "cuda", "model": {"kind": "directory", "path": str(tmp_path)}}
    )
    assert kv_bytes_per_token(config) == 2 * (512 + 64) * 2


def test_link_rates_are_those_of_tc():
    assert [bits_per_s(rate) for rate in ("400mbit", "1.5gbit", "64kbit")] == [
        400_000_000,
        1_500_000_000,
        64_000,
    ]


@pytest.mark.parametrize("rate", ["400", "fast", "0mbit", "-1mbit", "400 mbit", "400MBit"])
def test_a_rate_that_tc_would_not_take_is_refused_with_an_example(tmp_path, rate):
    message = refusal(tmp_path, network={"storage_rate": rate})
    assert "network.storage_rate: got" in message and "such as 400mbit" in message


def test_a_network_leaves_what_is_not_named_unshaped_but_must_name_the_storage_links(tmp_path):
    network = load(write(tmp_path, network={"storage_rate": "400mbit"})).network
    assert (network.compute_rate, network.store_rate) == (None, None)
    assert "network.storage_rate: must be given" in refusal(tmp_path, network={"compute_rate": "1gbit"})
    assert "did you mean 'compute_rate'?" in refusal(
        tmp_path, network={"storage_rate": None, "compute_rates": "1gbit"}
    )


def test_an_unknown_placement_or_router_names_the_known_ones(tmp_path):
    assert "affinity, paper, round_robin, random" in refusal(tmp_path, scheduler={"placement": "best"})
    assert "'placing' or 'rust'" in refusal(tmp_path, router={"kind": "nginx"})
