"""Engines that get other weights: nothing that was computed with the earlier ones comes back."""

from __future__ import annotations

import pytest

from dualpath_sgl.evals.agents.sessions import (
    TURNS,
    Session,
    forget_caches,
    play_all,
    post,
    reads,
    update_weights,
)
from dualpath_sgl.launch.supervision.cluster import Cluster
from scheduler_svc.wire.protocol import Path

pytestmark = pytest.mark.slow


def update_all(cluster: Cluster, directory, version: str | None) -> None:
    for engine in cluster.engines:
        update_weights(engine.url, directory, version)


def played_from_store(cluster: Cluster, names) -> dict:
    """Answers of every turn, all engines' own caches emptied before each but the first."""
    sessions = [Session(name) for name in names]
    for turn in range(TURNS):
        if turn:
            forget_caches(cluster)
        play_all(cluster.url, sessions, turn)
    return {session.name: session.answers for session in sessions}


@pytest.fixture
def restored(cluster, config):
    """The cluster's own weights again, under one version, for the tests that come after."""
    yield
    update_all(cluster, config.model.directory(), "first")


def test_after_an_update_prompts_get_the_new_weights_tokens_on_the_decode_path(
    cluster, config, right_answers, other_weights, restored
):
    before, after = right_answers.sessions, right_answers.other_sessions
    assert before != after
    cluster.set_policy("decode")
    assert played_from_store(cluster, before) == before

    update_all(cluster, other_weights, "second")
    earlier = reads(cluster)
    assert played_from_store(cluster, after) == after
    counted = reads(cluster)
    assert counted.paths[Path.DECODE] - earlier.paths.get(Path.DECODE, 0) >= len(after) * (TURNS - 1)
    assert counted.forwarded_bytes > earlier.forwarded_bytes
    assert counted.fallbacks == earlier.fallbacks

    # Back again, each engine on its own: without a version they share nothing, and are still right.
    update_all(cluster, config.model.directory(), None)
    earlier = reads(cluster)
    assert played_from_store(cluster, before) == before
    counted = reads(cluster)
    assert counted.forwarded_bytes == earlier.forwarded_bytes
    assert counted.decode_store_bytes == earlier.decode_store_bytes
    assert counted.fallbacks > earlier.fallbacks, "the scheduler knows that the two are not alike"

    # As soon as both are known by one name, they share.
    for engine in cluster.engines:
        post(f"{engine.url}/update_weight_version", {"new_version": "third"})
    forget_caches(cluster)
    earlier = counted
    assert played_from_store(cluster, before) == before
    assert reads(cluster).forwarded_bytes > earlier.forwarded_bytes
