"""Mode relay: stock engines, whose prefill engine lets a relay beside the decode engine help it to read."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request

import pytest
from conftest import CLUSTERS
from prometheus_client.parser import text_string_to_metric_families

from dualpath_sgl.evals.agents.sessions import TURNS, forget_caches, play_all
from dualpath_sgl.launch.config.cluster import ClusterConfig, Mode, load
from dualpath_sgl.launch.config.security import Security
from dualpath_sgl.launch.supervision.cluster import Cluster
from scheduler_svc.wire.keys import generate


@pytest.fixture(scope="module")
def relay_config(tmp_path_factory) -> ClusterConfig:
    """The parts know each other by their keys."""
    keys = tmp_path_factory.mktemp("relay") / "keys"
    described = load(CLUSTERS / "gqa-1p1d.yaml")
    described = described.model_copy(
        update={"name": "relay", "mode": Mode.RELAY, "security": Security(keys=keys)}
    )
    generate(keys, described.key_names())
    return described


@pytest.fixture(scope="module")
def cluster(relay_config, reference, one_cluster) -> Cluster:
    return one_cluster.get(relay_config)


def test_the_relay_reads_and_the_tokens_are_those_of_one_server(cluster, sessions, reference):
    for turn in range(TURNS):
        forget_caches(cluster)
        play_all(cluster.url, sessions, turn)
    assert {session.name: session.answers for session in sessions} == reference
    assert relay_metric(cluster, "dualpath_relay_read_bytes_total") > 0
    assert relay_metric(cluster, "dualpath_relay_refused_connections_total") == 0


def test_a_request_s_trace_says_who_loaded(cluster):
    listed = traces(cluster)
    helped = [facts for facts in listed if facts["relayed_bytes"]]
    assert helped and all(facts["path"] == "relay" for facts in helped)
    # Loads stand in the trace of SGLang's request, beside the stages that SGLang runs.
    assert all(facts["prompt_tokens"] and facts["services"] > 1 for facts in helped)
    shown = dualpath(cluster, "trace", "show", helped[0]["trace"])
    assert "by relays" in shown and "own " in shown and "relay-0 " in shown
    assert "load_back" in shown and "kv_send" in shown


def traces(cluster: Cluster) -> list[dict]:
    listed = dualpath(cluster, "trace", "show", "--list", "--all", "--json")
    return json.loads(listed)["traces"]


def dualpath(cluster: Cluster, *words: str) -> str:
    """What the command prints about the cluster."""
    asked = subprocess.run(
        [sys.executable, "-m", "dualpath_sgl.cli", *words, "--run-dir", str(cluster.run_dir)],
        capture_output=True,
        text=True,
    )
    assert asked.returncode == 0, asked.stderr
    return asked.stdout


def test_the_decode_engine_is_a_stock_one(cluster):
    logs = {name: cluster.processes[name].log_path.read_text() for name in ("prefill-0", "decode-0")}
    assert [name for name, log in logs.items() if "DualPath" in log] == ["prefill-0"]


def test_status_shows_the_relay_and_where_it_is_asked(cluster):
    relay = json.loads(dualpath(cluster, "status", "--json"))["processes"]["relay-0"]
    assert (relay["state"], relay["address"]) == ("running", cluster.relays[0].endpoint)


def relay_metric(cluster: Cluster, name: str) -> float:
    """Sum over the relays and over labels."""
    total = 0.0
    for relay in cluster.relays:
        with urllib.request.urlopen(relay.metrics_url, timeout=10) as answer:
            families = text_string_to_metric_families(answer.read().decode())
            total += sum(s.value for family in families for s in family.samples if s.name == name)
    return total
