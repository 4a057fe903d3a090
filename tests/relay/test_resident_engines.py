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
from dualpath_sgl.launch.processes.ports import FreePorts
from dualpath_sgl.launch.supervision.cluster import Cluster
from scheduler_svc.wire.protocol import Role

PROMPT_TOKENS, PROMPTS = 512, 3
PAGE_TOKENS = 16


def backend(**options: object) -> list[str]:
    extra = {
        "prefetch_threshold": PAGE_TOKENS,
        "relay": {"least_call_bytes": 0, "bounce_bytes": 32 * MIB, **options},
    }
    return [f"--hicache-storage-backend-extra-config={json.dumps(extra)}"]


@pytest.fixture
def cluster(tmp_path):
    port = FreePorts(HOST).take()
    config = ClusterConfig.model_validate(
        {
            "name": "resident",
            "device": "cpu",
            "mode": "both",
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
            "prefill": {
                "max_total_tokens": 4096,
                "extra_args": backend(decode_engines=[f"decode-0=tcp://{HOST}:{port}"]),
                "env": {"DUALPATH_RELAY": "1", "DUALPATH_ENGINE_ID": "prefill-0"},
            },
            "decode": {
                "max_total_tokens": 4096,
                "extra_args": backend(port=port),
                "env": {"DUALPATH_RELAY": "1", "DUALPATH_ENGINE_ID": "decode-0"},
            },
        }
    )
    cluster = Cluster(config, tmp_path / "cluster")
    cluster.start()
    yield cluster
    cluster.stop()


def stored_bytes(cluster: Cluster) -> float:
    with urllib.request.urlopen(cluster.master_metrics_url, timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = [sample for family in families for sample in family.samples]
    return sum(sample.value for sample in samples if sample.name == "master_allocated_bytes")


@pytest.mark.slow
def test_the_next_turn_needs_no_store(cluster):
    chance = random.Random(5)
    prompts = [[chance.randrange(1, 250) for _ in range(PROMPT_TOKENS)] for _ in range(PROMPTS)]
    first = send(cluster.url, prompts).answers
    nexts = [prompt + answer.tokens for prompt, answer in zip(prompts, first, strict=True)]
    truth = [answer.tokens for answer in send(cluster.url, nexts).answers]
    page_bytes = PAGE_TOKENS * 4 * 2 * 4 * 16 * 2
    eventually(
        lambda: stored_bytes(cluster) >= PROMPTS * PROMPT_TOKENS // PAGE_TOKENS * page_bytes,
        "every prompt is stored",
    )
    store = MooncakeDistributedStore()
    assert store.setup(HOST, "P2PHANDSHAKE", 0, 16 * MIB, "tcp", "", f"{HOST}:{cluster.ports.master}") == 0

    def is_empty() -> bool:
        store.remove_all(True)
        return stored_bytes(cluster) == 0

    eventually(is_empty, "the store has lost everything")
    cluster.flush_caches(Role.PREFILL)
    again = send(cluster.url, nexts).answers
    assert [answer.tokens for answer in again] == truth
    assert all(answer.cached_tokens >= PROMPT_TOKENS - PAGE_TOKENS for answer in again)
