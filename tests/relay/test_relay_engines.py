"""Stock prefill and decode engines, the prefill engine with the relay's backend; relays come and go."""

from __future__ import annotations

import json
import os
import random
import threading
import time
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families
from relay_world import ObedientRelay

from dualpath_sgl.evals.load.client import Burst, send
from dualpath_sgl.evals.relay.world import eventually
from dualpath_sgl.launch.config.cluster import ClusterConfig
from dualpath_sgl.launch.processes.ports import FreePorts
from dualpath_sgl.launch.supervision.cluster import Cluster

PROMPT_TOKENS, PROMPTS = 1024, 3
PAGE_TOKENS, TOKEN_BYTES = 16, 131072
RATE_MBIT = 320
RELAY_ENGINE = {"DUALPATH_ENABLED": "1", "DUALPATH_MODE": "relay", "DUALPATH_ENGINE_ID": "prefill-0"}


class Engines:
    def __init__(self, cluster: Cluster, ports: list[int]) -> None:
        self._cluster, self._ports = cluster, ports
        self._relays: list[ObedientRelay] = []
        rng = random.Random(5)
        self._prompts = [[rng.randrange(1, 250) for _ in range(PROMPT_TOKENS)] for _ in range(PROMPTS)]
        self._answers = [answer.tokens for answer in send(cluster.url, self._prompts).answers]
        stored = PROMPTS * PROMPT_TOKENS // PAGE_TOKENS * PAGE_TOKENS * TOKEN_BYTES
        eventually(lambda: self._stored_bytes() >= stored, "every prompt is stored", within_s=120)

    def _stored_bytes(self) -> float:
        with urllib.request.urlopen(self._cluster.master_metrics_url, timeout=10) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        samples = [sample for family in families for sample in family.samples]
        return sum(sample.value for sample in samples if sample.name == "master_allocated_bytes")

    def ask(self, count: int) -> Burst:
        """So many prompts at once, of which the engines hold nothing; all answers are those of the first time."""
        self._cluster.flush_caches()
        time.sleep(0.3)
        burst = send(self._cluster.url, self._prompts[:count])
        assert [answer.tokens for answer in burst.answers] == self._answers[:count]
        assert all(answer.cached_tokens >= PROMPT_TOKENS - PAGE_TOKENS for answer in burst.answers)
        return burst

    def times(self, what: str) -> None:
        """Printed, not asserted."""
        lone = [round(self.ask(1).job_s, 2) for _ in range(3)]
        burst = [round(self.ask(PROMPTS).job_s, 2) for _ in range(2)]
        print(f"{what}: lone {lone} s, burst of {PROMPTS} {burst} s, load {os.getloadavg()[0]:.1f}")

    def relay(self) -> ObedientRelay:
        number = len(self._relays)
        relay = ObedientRelay(
            f"127.0.0.1:{self._cluster.ports.master}",
            f"relay-{number}",
            rate=RATE_MBIT * 1e6 / 8,
            port=self._ports[number],
            ring_bytes=256 * 2**20,
        )
        self._relays.append(relay)
        time.sleep(2.0)  # the engine finds it by itself
        return relay

    def end(self) -> None:
        for relay in self._relays:
            relay.end()


@pytest.fixture
def engines(tmp_path):
    free = FreePorts("127.0.0.1")
    ports = [free.take(), free.take()]
    extra = {
        "prefetch_threshold": PAGE_TOKENS,
        "read_rate_bytes_per_s": RATE_MBIT * 1e6 / 8,
        "relay": {"relays": [f"relay-{number}=tcp://127.0.0.1:{port}" for number, port in enumerate(ports)]},
    }
    backend = [
        "--hicache-storage-backend=mooncake",
        f"--hicache-storage-backend-extra-config={json.dumps(extra)}",
    ]
    config = ClusterConfig.model_validate(
        {
            "name": "relay",
            "device": "cpu",
            "mode": "basic",
            "page_size": PAGE_TOKENS,
            "model": {
                "kind": "tiny",
                "layers": 4,
                "hidden": 64,
                "heads": 64,
                "kv_heads": 64,
                "head_dim": 64,
                "context_length": 2048,
                "seed": 7,
            },
            "store": {"segment_bytes": 2**30},
            "tracing": {"enabled": False},
            "prefill": {"max_total_tokens": 4096, "extra_args": backend, "env": RELAY_ENGINE},
            "decode": {"max_total_tokens": 4096},
        }
    )
    cluster = Cluster(config, tmp_path / "cluster")
    cluster.start()
    running = None
    try:
        running = Engines(cluster, ports)
        yield running
    finally:
        if running is not None:
            running.end()
        cluster.stop()


@pytest.mark.slow
def test_stock_engines_load_through_relays_that_come_and_go(engines, capsys):
    with capsys.disabled():
        engines.times("no relay")
        first = engines.relay()
        engines.times("one relay")
        assert first.reads()
        second = engines.relay()
        engines.times("two relays")
        assert second.reads()
        first.end()
        engines.times("the first one is gone")
        threading.Timer(0.8, second.process.kill).start()
        print("the last one is killed in a load:", round(engines.ask(1).job_s, 2), "s")
        engines.ask(PROMPTS)
