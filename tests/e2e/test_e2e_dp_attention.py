"""DP attention on both sides: every DP rank plans, serves and counts for itself."""

from __future__ import annotations

import pytest
from conftest import CLUSTERS

from dualpath_sgl.evals.agents.sessions import (
    TURNS,
    Session,
    forget_caches,
    play_all,
    reads,
    reads_of,
    settled_status,
)
from dualpath_sgl.launch.config.cluster import load
from scheduler_svc.wire.protocol import Path, Role

pytestmark = pytest.mark.slow

MORE_SESSIONS = ("ida", "joe", "kim", "lea", "max")
"""Enough that every DP rank of either side serves some: which one does is SGLang's choice."""


@pytest.fixture(scope="module")
def two_dp_ranks(reference, one_cluster):
    return one_cluster.get(load(CLUSTERS / "gqa-1p1d-dp2.yaml"))


def test_sessions_on_the_decode_path_get_the_single_servers_tokens_and_pages_of_the_right_dp_rank(
    two_dp_ranks, reference
):
    sessions = [Session(name) for name in (*reference, *MORE_SESSIONS)]
    for turn in range(TURNS):
        forget_caches(two_dp_ranks)
        play_all(two_dp_ranks.url, sessions, turn)
        if turn == 0:
            # Each rank has built what SGLang compiles at its first page, which takes longer than a plan may.
            first_fallbacks = reads(two_dp_ranks).fallbacks
    assert {session.name: session.answers for session in sessions if session.name in reference} == reference

    status = settled_status(two_dp_ranks)
    engines = {entry.engine.engine_id: entry for entry in status.engines}
    assert set(engines) == {"prefill-0/dp0", "prefill-0/dp1", "decode-0/dp0", "decode-0/dp1"}
    assert {(entry.engine.dp_rank, entry.engine.dp_size) for entry in status.engines} == {(0, 2), (1, 2)}
    endpoints = {entry.engine.page_endpoint for entry in status.engines}
    assert len(endpoints) == 3  # a prefill engine has none

    counted = reads_of(status)
    # A plan at the wrong rank ends as a fallback, after a time-out.
    assert counted.fallbacks == first_fallbacks, status.fallbacks
    assert counted.duplicate_store_pages == 0
    assert counted.prefill_store_bytes == 0
    assert counted.paths[Path.DECODE] >= len(sessions) * (TURNS - 1)
    assert counted.forwarded_bytes == counted.decode_store_bytes
    for entry in status.engines:
        own = entry.store_read_bytes if entry.engine.role is Role.DECODE else entry.forwarded_bytes
        assert own > 0, f"{entry.engine.engine_id} had no part in it"
