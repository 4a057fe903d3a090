"""Real engines: what the decode engine holds reaches the prefill engine by key, and nobody reads the store."""

from __future__ import annotations

import json
import random
import urllib.request

import pytest
from mooncake.store import MooncakeDistributedStore
from prometheus_client.parser import text_string_to_metric_families

from dualpath_sgl.evals.load.client import send
from dualpath_sgl.evals.relay.world import HOST, MIB, eventually
from dualpath_sgl.launch.config.cluster import ClusterConfig
from dualpath_sgl.launch.supervision.cluster import Cluster
from scheduler_svc.wire.keys import generate
from scheduler_svc.wire.protocol import RankInfo, Role

PROMPT_TOKENS, PROMPTS = 512, 3
PAGE_TOKENS = 16
WAIT_S = 60.0
EXTRA = {"prefetch_threshold": PAGE_TOKENS, "relay": {"least_call_bytes": 0, "bounce_bytes": 32 * MIB}}
BACKEND = f"--hicache-storage-backend-extra-config={json.dumps(EXTRA)}"
DECODE_CACHES = [
    "--disaggregation-decode-enable-radix-cache",
    "--enable-hierarchical-cache",
    "--hicache-mem-layout=page_first_direct",
    "--hicache-io-backend=direct",
    "--hicache-write-policy=write_through",
    "--hicache-storage-prefetch-policy=wait_complete",
    "--hicache-storage-backend=mooncake",
]


@pytest.fixture
def cluster(tmp_path):
    keys = tmp_path / "keys"
    generate(keys, ["prefill-0", "decode-0", "router", "operator"])
    config = ClusterConfig.model_validate(
        {
            "name": "resident",
            "device": "cpu",
            "mode": "relay",
            "relays": {"count": 0},
            "page_size": PAGE_TOKENS,
            "model": {
                "kind": "tiny",
                "layers": 4,
                "hidden": 64,
                "heads": 4,
                "kv_heads": 4,
                "head_dim": 16,
                "context_length": 2048,
                "seed": 7,
            },
            "store": {"segment_bytes": 256 * MIB},
            "tracing": {"enabled": False},
            "security": {"keys": str(keys)},
            "prefill": {"max_total_tokens": 4096, "extra_args": [BACKEND]},
            "decode": {"max_total_tokens": 4096, "extra_args": [*DECODE_CACHES, BACKEND]},
        }
    )
    cluster = Cluster(config, tmp_path / "cluster")
    cluster.start()
    yield cluster
    cluster.stop()


def metric(url: str, name: str) -> float:
    with urllib.request.urlopen(url, timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


def stored_bytes(cluster: Cluster) -> float:
    return metric(cluster.master_metrics_url, "master_allocated_bytes")


def given_bytes(cluster: Cluster) -> float:
    (decode,) = [engine.url for engine in cluster.engines if engine.role is Role.DECODE]
    return metric(f"{decode}/metrics", "dualpath_rank_served_bytes_total")


def engines(cluster: Cluster) -> dict[Role, RankInfo]:
    with cluster.ask_scheduler() as client:
        return {one.engine.role: one.engine for one in client.status(10).engines}


@pytest.mark.slow
def test_the_next_turn_needs_no_store(cluster):
    said = engines(cluster)
    assert said[Role.PREFILL].objects == said[Role.DECODE].objects is not None
    assert said[Role.DECODE].fetch_endpoint is not None

    chance = random.Random(5)
    prompts = [[chance.randrange(1, 250) for _ in range(PROMPT_TOKENS)] for _ in range(PROMPTS)]
    first = send(cluster.url, prompts).answers
    nexts = [[*prompt, *answer.tokens] for prompt, answer in zip(prompts, first, strict=True)]
    truth = [answer.tokens for answer in send(cluster.url, nexts).answers]
    page_bytes = PAGE_TOKENS * 4 * 2 * 4 * 16 * 2
    eventually(
        lambda: stored_bytes(cluster) >= PROMPTS * PROMPT_TOKENS // PAGE_TOKENS * page_bytes,
        "every prompt is stored",
        WAIT_S,
    )
    store = MooncakeDistributedStore()
    assert store.setup(HOST, "P2PHANDSHAKE", 0, 16 * MIB, "tcp", "", f"{HOST}:{cluster.ports.master}") == 0

    def is_empty() -> bool:
        store.remove_all(True)
        return stored_bytes(cluster) == 0

    def comes_from_the_decode_engine() -> bool:
        """On a busy host an answer may come too late, and the prompt is computed."""
        cluster.flush_caches(Role.PREFILL)
        eventually(is_empty, "the store has lost everything", WAIT_S)
        again = send(cluster.url, nexts).answers
        assert [answer.tokens for answer in again] == truth
        return all(answer.cached_tokens >= PROMPT_TOKENS - PAGE_TOKENS for answer in again)

    eventually(comes_from_the_decode_engine, "the prompts come from the decode engine", WAIT_S)
    least = PROMPTS * (PROMPT_TOKENS // PAGE_TOKENS - 1) * page_bytes
    eventually(lambda: given_bytes(cluster) >= least, "it says what it gave", WAIT_S)
