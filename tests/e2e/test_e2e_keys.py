"""A whole cluster whose parts know each other by their keys: same tokens, forwarded pages, no strangers."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from conftest import CLUSTERS

from dualpath_sgl.evals.agents.sessions import TURNS, Session, forget_caches, play_all, reads
from dualpath_sgl.launch.config.cluster import ClusterConfig, load
from dualpath_sgl.launch.supervision.cluster import Cluster
from scheduler_svc.wire.client import SchedulerClient
from scheduler_svc.wire.keys import generate

pytestmark = pytest.mark.slow

SECURITY = """
security:
  keys: {keys}
"""


@pytest.fixture(scope="module")
def keys_config(tmp_path_factory) -> ClusterConfig:
    folder = tmp_path_factory.mktemp("keys")
    generate(folder / "keys", ["prefill-0", "decode-0", "relay-0", "router", "operator"])
    described = (CLUSTERS / "gqa-1p1d.yaml").read_text().replace("policy: round_robin", "kind: placing")
    file = folder / "cluster.yaml"
    file.write_text(described + SECURITY.format(keys=folder / "keys"))
    return load(file)


@pytest.fixture(scope="module")
def cluster(keys_config, reference, one_cluster) -> Cluster:
    return one_cluster.get(keys_config)


def test_pages_are_forwarded_between_engines_that_know_each_others_keys(cluster, sessions, reference):
    cluster.set_policy("decode")
    for turn in range(TURNS):
        forget_caches(cluster)
        play_all(cluster.url, sessions, turn)
    assert {session.name: session.answers for session in sessions} == reference
    counted = reads(cluster)
    assert counted.forwarded_bytes == counted.decode_store_bytes > 0
    assert (counted.fallbacks, counted.prefill_store_bytes) == (0, 0)


def test_the_router_is_given_places_and_a_stranger_nothing(cluster):
    with SchedulerClient(cluster.scheduler_address) as stranger, pytest.raises(TimeoutError):
        stranger.status(1.0)
    log = cluster.processes["router"].log_path.read_text()
    assert "places by itself" not in log


def test_status_finds_the_keys_in_the_run_directory(cluster):
    command = [sys.executable, "-m", "dualpath_sgl.cli", "status", "--run-dir", str(cluster.run_dir)]
    asked = subprocess.run(command, capture_output=True, text=True)
    assert asked.returncode == 0 and "decode-0" in asked.stdout and "rooms open" in asked.stdout, asked.stderr


def test_an_engine_whose_key_is_taken_away_is_forgotten_and_no_request_fails(cluster, keys_config, reference):
    public = keys_config.security.keys / "peers/decode-0.key"
    aside = public.rename(public.with_suffix(".aside"))
    try:
        with cluster.ask_scheduler() as client:
            until(lambda: engines(client) == {"prefill-0"}, "decode-0 is forgotten")
        session = Session("ada")
        session.play(cluster.url, 0)
        assert session.answers == reference["ada"][:1]
    finally:
        aside.rename(public)
    with cluster.ask_scheduler() as client:
        until(lambda: engines(client) == {"prefill-0", "decode-0"}, "decode-0 is back")


def engines(client: SchedulerClient) -> set[str]:
    return {rank.engine.engine_id for rank in client.status(10.0).engines}


def until(condition, what: str) -> None:
    deadline_s = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.2)
