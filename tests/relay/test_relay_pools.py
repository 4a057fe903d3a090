"""Every kind of KV that HiCache stores, through SGLang's own pools and backend: its bytes come through relays."""

from __future__ import annotations

import pytest
import sglang_pools as pools
from sglang.srt.mem_cache.hicache_storage import PoolName

from dualpath_sgl.evals.relay.world import HOST, eventually

DIRECT = "page_first_direct"


def _dsa(layout: str = DIRECT) -> tuple[object, dict[object, object]]:
    anchor = pools.mla(layout)
    return anchor, {PoolName.INDEXER: pools.indexer(anchor)}


def _dsv4(layout: str) -> tuple[object, dict[object, object]]:
    return pools.dsv4_anchor(layout), {
        PoolName.DEEPSEEK_V4_C4: pools.dsv4("c4", 64 * 584, 5, layout),
        PoolName.DEEPSEEK_V4_C4_INDEXER: pools.dsv4("c4i", 64 * 132, 5, layout),
        PoolName.DEEPSEEK_V4_C128: pools.dsv4("c128", 2 * 584, 4, layout),
        PoolName.SWA: pools.dsv4("swa", 16 * 584, 2, layout),
        PoolName.DEEPSEEK_V4_C4_STATE: pools.dsv4_states("c4s", 5, layout),
        PoolName.DEEPSEEK_V4_C128_STATE: pools.dsv4_states("c128s", 4, layout),
    }


KINDS = {
    "MHA": lambda: ((pools.mha(DIRECT), {}), {"tp": (1, 2)}),
    "MHA page_first": lambda: ((pools.mha("page_first"), {}), {}),
    "MHA in fp8": lambda: ((pools.mha(DIRECT, dtype=pools.torch.float8_e4m3fn), {}), {}),
    "MHA, unequal heads": lambda: ((pools.mha(DIRECT, v_head_dim=32), {}), {}),
    "MHA with an indexer": lambda: (
        ((it := pools.mha(DIRECT)), {PoolName.INDEXER: pools.keys_only(it)}),
        {},
    ),
    "MLA": lambda: ((pools.mla(DIRECT), {}), {"is_mla": True}),
    "MLA layer_first": lambda: ((pools.mla("layer_first"), {}), {"is_mla": True}),
    "DSA": lambda: (_dsa(), {"is_mla": True}),
    "Mamba": lambda: ((pools.mha(DIRECT), {PoolName.MAMBA: pools.mamba()}), {}),
    "KDA with DSA": lambda: (
        ((it := _dsa())[0], {**it[1], PoolName.MAMBA: pools.mamba()}),
        {"is_mla": True, "tp": (3, 4)},
    ),
    "draft": lambda: ((pools.mha(DIRECT), {PoolName.DRAFT: pools.mha(DIRECT, layers=1)}), {}),
    "SWA": lambda: ((pools.mha(DIRECT), {PoolName.SWA: pools.mha(DIRECT, layers=2)}), {}),
    "DeepSeek-V4": lambda: (_dsv4(DIRECT), {"is_mla": True, "tp": (1, 4)}),
    "DeepSeek-V4 layer_first": lambda: (_dsv4("layer_first"), {"is_mla": True}),
}


@pytest.fixture
def mooncake(store, monkeypatch):
    """SGLang's backend finds the store in its environment."""
    monkeypatch.setenv("MOONCAKE_MASTER", store.master)
    monkeypatch.setenv("MOONCAKE_PROTOCOL", "tcp")
    monkeypatch.setenv("MOONCAKE_TE_META_DATA_SERVER", "P2PHANDSHAKE")
    monkeypatch.setenv("MOONCAKE_GLOBAL_SEGMENT_SIZE", "0")
    monkeypatch.setenv("MOONCAKE_LOCAL_HOSTNAME", HOST)


@pytest.fixture(scope="module")
def relays(store):
    from relay_world import ObedientRelay

    relays = [ObedientRelay(store.master, f"relay-{number}") for number in range(2)]
    yield relays
    for relay in relays:
        relay.end()


@pytest.mark.parametrize("alone", [True, False], ids=["relays alone", "with the own client"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_kv_comes_through_relays(mooncake, relays, kind, alone):
    (anchor, sides), traits = KINDS[kind]()
    backend = pools.Backend(
        f"{kind}-{alone}", [f"{relay.name}={relay.endpoint}" for relay in relays], anchor, sides, **traits
    )
    loader = backend.store.loader
    # With it the own client reads only what relays do not bring.
    loader._is_shared = (lambda key: True) if alone else None
    eventually(lambda: len(loader.lanes_up()) == len(relays), "both relays may be asked")
    stored = backend.put()
    assert backend.get() == stored
    assert all(stored.values())
    if alone:
        assert loader.counts.own_bytes == 0
        assert loader.counts.relay_bytes == sum(len(it) for blocks in stored.values() for it in blocks)
    backend.store.close()


@pytest.mark.parametrize(("pp", "rank"), [(1, 3), (2, 3)])
def test_latent_kv_is_shared_by_ranks_and_states_and_heads_are_not(mooncake, pp, rank):
    (anchor, sides), _ = KINDS["KDA with DSA"]()
    sides = {**sides, PoolName.DRAFT: pools.mha(DIRECT, layers=1)}
    backend = pools.Backend("shared", [], anchor, sides, is_mla=True, tp=(rank, 4), pp=(pp - 1, pp))
    it, page = backend.store, "0123456789abcdef" * 4
    keys, _, _ = it._batch_preprocess(it._tag_keys([page]), pools.torch.arange(pools.PAGE_TOKENS))
    shared = dict.fromkeys(keys, True)
    for side in sides:
        names, _ = it._get_hybrid_page_component_keys([page], pools.PoolTransfer(name=side))
        shared |= dict.fromkeys(it._tag_keys(names), side == PoolName.INDEXER)
    assert {key: it.loader._is_shared(key) for key in shared} == shared
    assert set(shared.values()) == {True, False}
    it.close()


def test_memory_of_the_device_is_never_written_by_copying(mooncake, relays):
    """A pool's tensors that are not on the CPU are no destinations: those reads are the own client's."""
    backend = pools.Backend("device", [], pools.mha(DIRECT), {})
    destinations = backend.store._destinations
    (buffer, *_) = backend.store._iter_host_pool_buffers(backend.anchor)
    assert destinations.hold([(buffer.data_ptr(), buffer.numel() * buffer.element_size())])
    elsewhere = pools.torch.zeros(16, device="meta")
    backend.store._may_be_filled(pools.SimpleNamespace(kv_buffer=elsewhere))
    assert not destinations.hold([(elsewhere.data_ptr(), 1)])
    backend.store.close()
