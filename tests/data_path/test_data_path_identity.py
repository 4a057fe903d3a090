"""Keys of the store and fingerprints differ whenever bytes do, and are equal where pages can be shared."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from data_path_world import FINGERPRINT, LAYERS, PAGE_TOKENS, Rank, bytes_of, eventually, host_pool, rooms
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.storage.mooncake_store.mooncake_store import MooncakeStore
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

from dualpath_sgl.lanes.page_server import PageServer
from dualpath_sgl.lanes.peer_lane import PeerLane
from dualpath_sgl.launch.processes.ports import FreePorts
from dualpath_sgl.pools import weights
from dualpath_sgl.pools.key_tag import BESIDE_KV, TAG, after_generate_storage_config
from dualpath_sgl.pools.layout import fingerprint, page_blocks
from dualpath_sgl.pools.weights import Weights
from dualpath_sgl.relay.client.store import RelayStore
from dualpath_sgl.start.dp_rank import dp_place
from dualpath_sgl.storage import DualPathStorage

LONG_S = 60.0
PAGES = 8
MODEL = "tiny"


@pytest.fixture(scope="module", autouse=True)
def model_flags() -> None:
    use_model_flags()


def use_model_flags(**flags) -> None:
    set_global_server_args_for_scheduler(ServerArgs(model_path="dummy", **flags))


def pool_of(layout: str = "page_first_direct", layers: tuple[int, int] = (0, LAYERS), **facts):
    """A host pool of `PAGES` pages."""
    made = host_pool(PAGES)
    made.layout, (made.start_layer, made.end_layer) = layout, layers
    for name, value in facts.items():
        setattr(made, name, value)
    return made


def config_of(tag: str | None = None, **facts) -> HiCacheStorageConfig:
    ranks = dict(tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, attn_cp_rank=0, attn_cp_size=1)
    rest = dict(
        is_mla_model=False, enable_storage_metrics=False, is_page_first_layout=False, model_name=MODEL
    )
    return HiCacheStorageConfig(**ranks | rest | facts, extra_config={TAG: tag} if tag else {})


def controller_of(pool, dtype=torch.float32, **beside) -> SimpleNamespace:
    """SGLang's, with more host pools by name."""
    entries = [SimpleNamespace(name=name, host_pool=other) for name, other in {"kv": pool, **beside}.items()]
    return SimpleNamespace(
        storage_host_pool=pool,
        mem_pool_host=SimpleNamespace(entries=entries) if beside else pool,
        mem_pool_device=SimpleNamespace(dtype=dtype),
    )


def tagged(pool=None, dtype=torch.float32, **facts) -> HiCacheStorageConfig:
    """What SGLang's controller builds for its storage backend, through our hook."""
    return after_generate_storage_config(config_of(**facts), controller_of(pool or pool_of(), dtype))


def tag_of(*args, **facts) -> str:
    return tagged(*args, **facts).extra_config[TAG]


def test_engines_of_one_kind_have_one_tag_whatever_their_rank_of_dp_or_tp():
    assert tag_of() == tag_of() == tag_of(dp_rank=1)
    assert tag_of(tp_size=2) == tag_of(tp_size=2, tp_rank=1)


def test_every_rank_of_an_mla_model_holds_the_same_bytes_whatever_tp_size_is():
    assert tag_of(is_mla_model=True, tp_size=4) == tag_of(is_mla_model=True)


@pytest.mark.case("store_filled_in_other_layout")
def test_whatever_changes_bytes_changes_the_tag():
    uint8 = pool_of(dtype=torch.uint8)
    tags = [
        tag_of(),
        tag_of(pool_of(layout="page_first")),
        tag_of(pool_of(page_size=2 * PAGE_TOKENS)),
        tag_of(pool_of(head_num=1, head_dim=16)),
        tag_of(pool_of(layers=(LAYERS, 2 * LAYERS))),
        tag_of(uint8, torch.float8_e4m3fn),
        tag_of(uint8, torch.float8_e5m2),
        tag_of(tp_size=2),
        tag_of(pp_size=2),
        tag_of(pp_size=2, pp_rank=1),
        tag_of(attn_cp_size=2),
        tag_of(attn_cp_size=2, attn_cp_rank=1),
    ]
    assert len(set(tags)) == len(tags)


@pytest.mark.parametrize(
    "flags",
    [
        {"revision": "v2"},
        {"json_model_override_args": '{"rope_theta": 500000}'},
        {"quantization": "fp8"},
        {"kv_scales": "1.0"},
    ],
)
def test_another_model_under_the_same_name_changes_the_tag(flags, tmp_path):
    before = tag_of()
    if "kv_scales" in flags:
        (scales := tmp_path / "scales.json").write_text(flags["kv_scales"])
        flags = {"quantization_param_path": str(scales)}
    try:
        use_model_flags(**flags)
        assert tag_of() != before
    finally:
        use_model_flags()


def test_an_operators_own_tag_stays_in_front():
    assert tag_of(tag="tenant-a") == f"tenant-a-{tag_of()}"


def test_the_operators_settings_are_not_changed():
    before = config_of(tag="tenant-a")
    after_generate_storage_config(before, controller_of(pool_of()))
    assert before.extra_config == {TAG: "tenant-a"}


def test_pools_beside_the_kv_are_named_and_change_the_tag():
    pool, configs = pool_of(), []
    for swa in (pool_of(), pool_of(dtype=torch.float16)):
        configs.append(after_generate_storage_config(config_of(), controller_of(pool, swa=swa)))
    assert [config.extra_config[BESIDE_KV] for config in configs] == [["swa"], ["swa"]]
    assert len({tag_of(pool), *(config.extra_config[TAG] for config in configs)}) == 3


# -- the store itself ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def master(tmp_path_factory) -> Iterator[str]:
    """Address of a real mooncake_master."""
    ports = FreePorts("127.0.0.1")
    address, metrics = f"127.0.0.1:{ports.take()}", ports.take()
    argv = [
        str(Path(sys.executable).parent / "mooncake_master"),
        "--rpc_address=127.0.0.1",
        f"--rpc_port={address.rpartition(':')[2]}",
        "--metrics_host=127.0.0.1",
        f"--metrics_port={metrics}",
    ]
    log = (tmp_path_factory.mktemp("master") / "log").open("w")
    process = subprocess.Popen(argv, stdout=log, stderr=log)
    yield address
    process.kill()
    process.wait()


def store_of(master: str, config: HiCacheStorageConfig, pool: MHATokenToKVPoolHost, kind=MooncakeStore):
    """An engine's client of the store; with a segment of its own."""
    config.extra_config |= {
        "master_server_address": master,
        "local_hostname": "127.0.0.1",
        "metadata_server": "P2PHANDSHAKE",
        "protocol": "tcp",
        "device_name": "",
        "global_segment_size": 64 << 20,
    }
    store = kind.__new__(kind)
    (RelayStore if issubclass(kind, RelayStore) else MooncakeStore).__init__(store, config)
    MooncakeStore.register_mem_pool_host(store, pool)
    return store


@pytest.mark.case("store_filled_in_other_layout")
def test_pages_that_an_engine_of_another_layout_stored_are_not_found(master):
    """Same model, same sizes: as SGLang names them the keys would be the same."""
    names, pages = [f"hash{n}" for n in range(PAGES)], torch.arange(PAGES * PAGE_TOKENS)
    theirs, ours, twin = pool_of(layout="page_first"), pool_of(), pool_of()
    theirs_store = store_of(master, config_of(), theirs)
    assert all(theirs_store.batch_set_v1(names, pages))
    our_store = store_of(master, tagged(ours), ours, DualPathStorage)
    assert our_store.batch_exists(names) == 0
    assert not any(our_store.batch_get_v1(names, pages))

    assert all(our_store.batch_set_v1(names, pages))
    twin_store = store_of(master, tagged(twin), twin, DualPathStorage)
    assert twin_store.batch_exists(names) == PAGES
    assert all(twin_store.batch_get_v1(names, pages))
    assert torch.equal(bytes_of(twin, pages), bytes_of(ours, pages))


def test_pages_of_earlier_weights_are_not_found_in_the_store(master, monkeypatch):
    names, pages = [f"old{n}" for n in range(PAGES)], torch.arange(PAGES * PAGE_TOKENS)
    monkeypatch.setattr(weights, "_weights", changed := Weights(weights.AS_STARTED))
    pool = pool_of()
    store = store_of(master, tagged(pool), pool, DualPathStorage)
    assert all(store.batch_set_v1(names, pages))
    assert store.batch_exists(names) == PAGES
    changed.changing("update-1")
    assert store.batch_exists(names) == 0
    assert all(store.batch_set_v1(names, pages))  # a backup that was under way
    changed.flushed()
    assert store.batch_exists(names) == 0


# -- between engines -------------------------------------------------------------------------------


@pytest.mark.case("pipeline_stages_share_fingerprint")
def test_ranks_whose_pages_cannot_be_exchanged_have_other_fingerprints():
    prints = [
        fingerprint(pool_of(), MODEL, 1),
        fingerprint(pool_of(layers=(LAYERS, 2 * LAYERS)), MODEL, 1),
        fingerprint(pool_of(), "other", 1),
        fingerprint(pool_of(), MODEL, 2),
        fingerprint(pool_of(), MODEL, 1, store_keys="of-other-dtype"),
        fingerprint(pool_of(), MODEL, 2, tp_rank=1),
    ]
    assert len(set(prints)) == len(prints)
    assert fingerprint(pool_of(), MODEL, 1) == prints[0]


@pytest.mark.case("dcp_page_blocks")
def test_pages_without_blocks_of_their_own_are_refused():
    def logical_pages(indices):
        return [4096 * page for page in range(len(indices) // 8)], [4096] * (len(indices) // 8)

    pool = SimpleNamespace(page_size=4, get_page_buffer_meta=logical_pages)
    with pytest.raises(ValueError, match="4 blocks of .* for 8 pages"):
        page_blocks(pool, torch.arange(32))
    pool.get_page_buffer_meta = lambda indices: ([0, 1, 2, 3], [1, 2, 1, 3])
    with pytest.raises(ValueError, match="no page of it can be moved by itself"):
        page_blocks(pool, torch.arange(8))
    with pytest.raises(ValueError):
        page_blocks(pool_of(), torch.arange(0))


def test_a_page_server_serves_no_page_under_the_name_of_earlier_weights():
    decode, prefill = Rank(PAGES), Rank(PAGES)
    server = PageServer("127.0.0.1", decode.forwarder.mooncake_address, FINGERPRINT, LONG_S, LONG_S)
    server.start()
    missing = []
    lane = PeerLane(
        server.endpoint, prefill.forwarder, FINGERPRINT, LONG_S, lambda *what: missing.append(what[1:])
    )
    lane.start()

    def pull() -> None:
        load, room = prefill.load(2), next(rooms)
        server.offer(room, 0)
        server.publish(room, *decode.blocks(decode.pages(2)))
        lane.submit(load, room, 2)
        load.close_part()
        eventually(lambda: not load.lanes_open, "the pull ends")
        eventually(lambda: room not in server._offers, "the decode engine holds nothing for it")

    pull()
    assert missing == []
    server.fingerprint = f"{FINGERPRINT}/w1"
    pull()
    assert missing == [(0, 2, "layout differs")]
    lane.fingerprint = server.fingerprint
    pull()
    assert len(missing) == 1


@pytest.mark.case("dp_ranks_share_engine_id")
def test_every_kind_of_data_parallelism_has_its_place():
    from sglang.srt.runtime_context import get_parallel

    dp_attention = dict(tp_size=2, moe_tp_size=2, attn_dp_size=2, attn_tp_size=1)
    assert dp_place() == (None, 1)
    with get_parallel().override(tp_rank=1, attn_dp_rank=1, attn_tp_rank=0, **dp_attention):
        assert dp_place() == (1, 2)
    with get_parallel().override(dp_size=3, dp_rank=2):
        assert dp_place() == (2, 3)
