"""What DualPath cannot serve is refused before an engine serves, in one sentence, and nothing else is."""

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import data_path_world
import pytest
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
from sglang.srt.mem_cache.memory_pool_host import LogicalHostPool

from dualpath_sgl.launch.setup.tiny_model import TinyModel, build
from dualpath_sgl.pools.key_tag import BESIDE_KV
from dualpath_sgl.start import facts
from dualpath_sgl.start.checks import BACKEND_CLASS, NO_BACKEND, OBSTACLES, REFUSALS, Facts, problems
from dualpath_sgl.start.verdict import Refused, require, verdict
from scheduler_svc.wire.protocol import Mode

PROJECT = Path(__file__).parents[2]
GOOD = Facts(
    enabled=True,
    role="decode",
    role_switch=False,
    hierarchical_cache=True,
    decode_radix_cache=True,
    decode_offload=False,
    backend=BACKEND_CLASS,
    zero_copy=True,
    layout="page_first_direct",
    io_backend="direct",
    unified_memory=False,
    host_memory_mode="cache",
    write_policy="write_through",
    page_size=64,
    tp_size=8,
    pp_size=1,
    attn_cp_size=1,
    dcp_size=1,
    transfer="nixl",
    patched=True,
    protocol="rdma",
    devices=("mlx5_0",),
    host_devices=frozenset({"mlx5_0", "mlx5_1"}),
    force_tcp=False,
    own_host="10.0.0.1",
    traced=True,
    otlp_endpoint="127.0.0.1:4317",
)
REFUSED = (
    ({"enabled": False}, "DUALPATH_ENABLED is unset"),
    ({"role": "prefill", "hierarchical_cache": False}, "--enable-hierarchical-cache is not given"),
    ({"role": "null", "hierarchical_cache": False}, "--enable-hierarchical-cache is not given"),
    ({"role": "prefill", "backend": NO_BACKEND}, "--hicache-storage-backend is none"),
    ({"role": "prefill", "backend": "file"}, "--hicache-storage-backend is file"),
    ({"role": "prefill", "backend": "other.Class"}, "--hicache-storage-backend is other.Class"),
    ({"decode_radix_cache": False}, "--disaggregation-decode-enable-radix-cache is not given"),
    ({"host_memory_mode": "buffer_only"}, "--hicache-host-memory-mode is buffer_only"),
    ({"extra_config_error": "ValueError: x"}, "--hicache-storage-backend-extra-config is not usable"),
    ({"zero_copy": False}, "interface_v1"),
    ({"page_size": 0}, "--page-size is 0"),
    ({"devices": ("mlx5_9",)}, "DUALPATH_DEVICE is mlx5_9: no such RDMA device, this host has mlx5_0"),
    ({"devices": (), "host_devices": frozenset()}, "DUALPATH_PROTOCOL is rdma"),
    ({"force_tcp": True}, "DUALPATH_PROTOCOL is rdma: MC_FORCE_TCP"),
    ({"protocol": "tcp", "devices": (), "force_tcp": True, "store_protocol": "rdma"}, "MOONCAKE_PROTOCOL"),
    ({"http_proxy": "http://127.0.0.1:9"}, "http_proxy is http://127.0.0.1:9"),
    ({"http_proxy": "http://p:9", "no_proxy": "10.1.0.0/16"}, "no_proxy=127.0.0.1,localhost,10.0.0.1"),
    ({"otlp_protocol": "http/json"}, "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL is http/json"),
)
"""Neither mode can serve these."""
RELAYED = (
    ({"beside_kv": "states"}, "the model is states"),
    ({"pool_without_bytes": "LogicalHostPool"}, "the model's KV host pool is LogicalHostPool"),
    ({"layout": "page_first"}, "--hicache-mem-layout is page_first"),
    ({"io_backend": "kernel"}, "--hicache-io-backend is kernel"),
    ({"pp_size": 2}, "--pp-size is 2"),
    ({"attn_cp_size": 4}, "--attn-cp-size is 4"),
    ({"dcp_size": 2}, "--dcp-size is 2"),
    ({"hierarchical_cache": False, "layout": "layer_first"}, "--enable-hierarchical-cache is not given"),
    ({"backend": NO_BACKEND}, "--hicache-storage-backend is none"),
    ({"transfer": "mori"}, "--disaggregation-transfer-backend is mori"),
    ({"role": "null"}, "--disaggregation-mode is 'null'"),
    ({"role_switch": True}, "--enable-pd-role-switch is set"),
    ({"radix_cache_backend": "mine"}, "--radix-cache-backend is mine"),
    ({"decode_offload": True}, "--disaggregation-decode-enable-offload-kvcache is set"),
    ({"patched": False}, "SGLang's decode engine is not patched"),
)
"""Relays serve these, decode-side loads do not."""
WARNED = (
    ({"write_policy": "write_back"}, "--hicache-write-policy is write_back"),
    ({"write_policy": "write_through_selective"}, "--hicache-write-policy"),
    ({"page_size": 1}, "--page-size is 1"),
    ({"page_size": 15}, "--page-size is 15"),
    ({"protocol": "tcp"}, "DUALPATH_DEVICE is mlx5_0"),
    ({"otlp_protocol": "http/protobuf"}, "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"),
    ({"otel_sdk_disabled": True}, "OTEL_SDK_DISABLED"),
    ({"otel_sampler": "always_off"}, "OTEL_TRACES_SAMPLER"),
)
FINE = (
    {},
    {"role": "prefill", "decode_radix_cache": False, "host_memory_mode": "buffer_only"},
    {"page_size": 16},
    {"backend": "mooncake", "zero_copy": None},
    {"decode_radix_cache": True, "transfer": "mooncake_tcp"},
    {"protocol": "tcp", "devices": (), "host_devices": frozenset(), "force_tcp": True},
    {"devices": ()},
    {"http_proxy": "http://p:9", "no_proxy": "*"},
    {"http_proxy": "http://p:9", "no_proxy": " 10.0.0.0/8 , localhost"},
    {"http_proxy": "http://p:9", "no_proxy": "cluster.local", "own_host": "p0.cluster.local"},
    {"http_proxy": "http://p:9", "no_proxy": "::1", "own_host": "::1"},
    {"otlp_protocol": "http/protobuf", "otlp_endpoint": "http://127.0.0.1:4318/v1/traces"},
    {"otlp_protocol": "http/protobuf", "traced": False},
)


@pytest.mark.parametrize("asked", [None, *Mode])
@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_an_engine_that_cannot_run_is_refused_with_setting_value_and_remedy(changes, said, asked):
    with pytest.raises(Refused) as refusal:
        require(verdict(replace(GOOD, **changes), asked))
    (sentence,) = [line for line in str(refusal.value).splitlines() if said in line]
    assert ": " in sentence and "; " in sentence


@pytest.mark.parametrize(("changes", "said"), RELAYED)
def test_what_relays_can_serve_runs_with_relays_and_says_why(changes, said):
    facts = replace(GOOD, **changes)
    found = verdict(facts)
    assert found.mode is Mode.RELAY and found.because.startswith(f"{said}: ")
    assert verdict(facts, Mode.RELAY).mode is Mode.RELAY
    with pytest.raises(Refused) as refusal:
        require(verdict(facts, Mode.DECODE_SIDE))
    (sentence,) = str(refusal.value).splitlines()
    assert sentence.startswith(said) and "; " in sentence


@pytest.mark.parametrize(("changes", "said"), WARNED)
def test_what_only_runs_worse_is_warned_of(changes, said):
    found = verdict(replace(GOOD, **changes))
    assert found.mode is Mode.DECODE_SIDE
    (warning,) = found.warnings
    assert said in str(warning)


@pytest.mark.parametrize("changes", FINE)
def test_what_works_is_passed_over_in_silence(changes):
    assert problems(replace(GOOD, **changes)) == []


def test_facts_that_nobody_knows_are_not_judged():
    assert problems(Facts()) == []


def test_every_rule_has_a_case_here():
    for rules, cases in ((REFUSALS, REFUSED + WARNED), (OBSTACLES, RELAYED)):
        silent = [rule for rule in rules if not any(rule(replace(GOOD, **changes)) for changes, _ in cases)]
        assert silent == []


def test_all_reasons_are_named_at_once_one_a_line():
    with pytest.raises(Refused) as refusal:
        require(verdict(replace(GOOD, zero_copy=False, otlp_protocol="http/json", page_size=1)))
    assert len(str(refusal.value).splitlines()) == 2


def test_a_mode_that_was_asked_for_is_the_only_one(monkeypatch):
    assert verdict(GOOD, Mode.RELAY).because == "DUALPATH_MODE is relay"
    assert verdict(GOOD).because == "nothing stands against it"


def storage_config(**changes) -> HiCacheStorageConfig:
    ranks = dict(tp_rank=0, tp_size=2, pp_rank=0, pp_size=1, attn_cp_rank=0, attn_cp_size=1)
    facts = dict(is_mla_model=True, enable_storage_metrics=False, is_page_first_layout=True, model_name="m")
    return HiCacheStorageConfig(**(ranks | facts | {"extra_config": {"interface_v1": 1}} | changes))


@pytest.fixture
def no_flags(monkeypatch):
    """SGLang's flags are one per process, and another test may have left some."""
    monkeypatch.setattr(facts, "_published", lambda read: None)


@pytest.mark.case("dcp_page_blocks")
@pytest.mark.usefixtures("no_flags")
def test_a_rank_of_decode_context_parallelism_loads_nothing_decode_side():
    split = storage_config(dcp_size=2, dcp_rank=0, logical_page_size=128)
    assert verdict(facts.of_backend(split, is_named=True)).because.startswith("--dcp-size is 2")
    assert verdict(facts.of_backend(storage_config(), is_named=True)).mode is Mode.DECODE_SIDE


@pytest.mark.usefixtures("no_flags")
@pytest.mark.parametrize(
    "changes", [{"pp_size": 2}, {"attn_cp_size": 2}, {"extra_config": {BESIDE_KV: ["mamba"]}}]
)
def test_a_rank_is_judged_by_what_its_backend_is_told(changes):
    found = verdict(facts.of_backend(storage_config(**changes), is_named=True))
    assert found.mode is Mode.RELAY


@pytest.mark.usefixtures("no_flags")
def test_a_dynamic_backend_must_be_given_addresses():
    config = storage_config(extra_config=None)
    assert verdict(facts.of_backend(config, is_named=True)).mode is not None
    with pytest.raises(Refused, match="interface_v1"):
        require(verdict(facts.of_backend(config, is_named=False)))


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_rank_of_a_pipeline_runs_with_relays(engine, role):
    engine = engine(role, parallel={"pp_size": 2})
    assert engine.sglang.backend.dualpath_mode is Mode.RELAY and engine.runtime is None


def test_a_rank_of_a_pipeline_does_not_load_decode_side(engine):
    with pytest.raises(ValueError, match="--pp-size is 2"):
        engine("decode", parallel={"pp_size": 2}, settings={"mode": "decode-side"})


def test_what_cannot_be_served_is_not_attached_at_run_time_and_the_engine_goes_on(engine):
    engine = engine("prefill")
    assert engine.detach()[0]
    right, engine.extra_config = engine.extra_config, engine.extra_config | {"interface_v1": 0}
    attached, said = engine.attach()
    assert not attached and "interface_v1" in said
    engine.extra_config = right
    attached, said = engine.attach()
    assert attached, said
    for policy in ("best_effort", "timeout", "wait_complete"):
        assert engine.attach(policy)[0]


@pytest.mark.case("logical_host_pool_at_start")
def test_a_host_pool_without_bytes_is_for_relays():
    pool = LogicalHostPool(8 * 256, 256, layout="page_first_direct")
    found = verdict(facts.of_pool(pool))
    assert found.mode is Mode.RELAY and "LogicalHostPool" in found.because


def test_a_host_pool_of_sglang_s_is_judged_by_its_layout():
    pool = data_path_world.host_pool(4)
    assert verdict(facts.of_pool(pool)).mode is Mode.DECODE_SIDE
    pool.layout = "layer_first"
    assert verdict(facts.of_pool(pool)).because.startswith("--hicache-mem-layout is layer_first")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return build(TinyModel(), tmp_path_factory.mktemp("model"))


BACKEND = (
    '{"backend_name": "dualpath", "interface_v1": 1, "module_path": "dualpath_sgl.storage", '
    '"class_name": "DualPathStorage"}'
)
HICACHE = (
    "--enable-hierarchical-cache",
    "--hicache-mem-layout=page_first_direct",
    "--hicache-io-backend=direct",
    "--hicache-storage-backend=dynamic",
    f"--hicache-storage-backend-extra-config={BACKEND}",
)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--disaggregation-mode=decode", *HICACHE), "--disaggregation-decode-enable-radix-cache"),
        (("--disaggregation-mode=prefill",), "--enable-hierarchical-cache"),
    ],
)
def test_an_engine_ends_with_the_sentence_before_it_loads_a_model(model, flags, said):
    """SGLang would name no remedy for the first; the second would run as upstream, unnoticed."""
    environment = os.environ | {
        "SGLANG_USE_CPU_ENGINE": "1",
        "DUALPATH_ENABLED": "1",
        "DUALPATH_ENGINE_ID": "e",
        "PYTHONPATH": str(PROJECT),
    }
    command = [
        sys.executable,
        "-m",
        "dualpath_sgl.launch.engine",
        f"--model-path={model}",
        "--device=cpu",
        *flags,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert any(
        line.startswith("dualpath_sgl.launch.engine: ") and said in line for line in done.stderr.splitlines()
    )


def test_warnings_of_an_engine_are_in_its_log(caplog, monkeypatch):
    monkeypatch.setattr(facts, "of_flags", lambda cfg: replace(GOOD, page_size=1))
    with caplog.at_level(logging.WARNING):
        facts._after_validations(object(), lambda args: None)
    assert "--page-size is 1" in caplog.text
