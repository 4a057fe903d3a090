"""Two ranks per engine: both agree on the plan and on how many pages landed."""

from __future__ import annotations

import pytest
from conftest import CLUSTERS

from dualpath_sgl.evals.agents.sessions import TURNS, Session, forget_caches, play_all, reads
from dualpath_sgl.launch.config.cluster import load


@pytest.fixture(scope="module")
def two_ranks(reference, one_cluster):
    return one_cluster.get(load(CLUSTERS / "gqa-1p1d-tp2.yaml"))


def test_two_ranks_per_engine_give_the_tokens_of_one(two_ranks, reference):
    two_ranks.set_policy("split")
    sessions = [Session(name) for name in reference]
    for turn in range(TURNS):
        forget_caches(two_ranks)
        play_all(two_ranks.url, sessions, turn)
    assert {session.name: session.answers for session in sessions} == reference
    counted = reads(two_ranks)
    assert counted.decode_store_bytes > 0
    assert counted.forwarded_bytes == counted.decode_store_bytes
    assert counted.prefill_store_bytes > 0
    assert counted.duplicate_store_pages == 0
    assert counted.fallbacks == 0
