"""Mode relay: stock engines, whose prefill engine lets a relay beside the decode engine help it to read.

The scheduler tells of the relay and places every request.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
from conftest import CLUSTERS
from scrapes import WAIT_S, samples, total, wait_for

from dualpath_sgl.evals.agents.sessions import TURNS, forget_caches, play_all
from dualpath_sgl.launch.config.cluster import ClusterConfig, Mode, Router, RouterKind, load
from dualpath_sgl.launch.config.security import Security
from dualpath_sgl.launch.supervision.cluster import Cluster
from scheduler_svc.wire.keys import generate
from scheduler_svc.wire.protocol import Mode as EngineMode
from scheduler_svc.wire.protocol import Path, Role, Status


@pytest.fixture(scope="module")
def relay_config(tmp_path_factory) -> ClusterConfig:
    """The parts know each other by their keys."""
    keys = tmp_path_factory.mktemp("relay") / "keys"
    described = load(CLUSTERS / "gqa-1p1d.yaml")
    described = described.model_copy(
        update={
            "name": "relay",
            "mode": Mode.RELAY,
            "router": Router(kind=RouterKind.PLACING),
            "security": Security(keys=keys),
        }
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


def test_the_prefill_engine_counts_what_the_relay_brought(cluster, config, sessions):
    port = [next(engine.url for engine in cluster.engines if engine.role == Role.PREFILL) + "/metrics"]

    def counted(name: str, **labels: str) -> float:
        return total(port, f"dualpath_rank_{name}", **labels)

    forget_caches(cluster)  # of idle engines: nothing earlier is counted later
    before = counted("prompt_pages_total")
    play_all(cluster.url, sessions, 0)
    pages = sum(len(session.prompt(0)) // config.page_size for session in sessions)
    wait_for(lambda: counted("prompt_pages_total"), before + pages)
    assert counted("pages_total") == counted("needed_pages_total") > 0
    assert counted("pages_total", source="recomputed") == 0
    wait_for(lambda: counted("kv_bytes_total", path="relay", source="relay")
             - counted("helper_bytes_total", helper="relay-0", kind="relay"), 0)  # fmt: skip
    assert (
        0
        < counted("helper_bytes_total")
        <= relay_metric(cluster, "dualpath_relay_served_bytes_total", end="released")
    )
    assert counted("helper_lost_total") == 0 and counted("scheduler_connected") == 1


def test_top_shows_engines_the_relay_and_where_pages_came_from(cluster):
    found = json.loads(dualpath(cluster, "top", "--json"))
    told = [(engine["engine"], engine["answers"], engine["connected"]) for engine in found["engines"]]
    assert told == [("prefill-0", True, True), ("decode-0", True, True)]
    assert [one["relay"] for one in found["relays"]] == ["relay-0"]
    assert found["hit_rate"] > 0 and found["pages"]["store"] > 0 and found["faults"] == 0


def test_a_request_s_trace_says_who_loaded(cluster):
    listed = traces(cluster)
    helped = [facts for facts in listed if facts["relayed_bytes"]]
    assert helped and all(facts["path"] == "relay" for facts in helped)
    # Loads stand in the trace of SGLang's request, beside the stages that SGLang runs.
    assert all(facts["prompt_tokens"] and facts["services"] > 1 for facts in helped)
    shown = dualpath(cluster, "trace", "show", helped[0]["trace"])
    for told in ("by relays", "own ", "relay-0", "load_back", "relay to prefill"):
        assert told in shown, shown


def traces(cluster: Cluster) -> list[dict]:
    listed = dualpath(cluster, "trace", "show", "--list", "--all", "--json")
    return json.loads(listed)["traces"]


def dualpath(cluster: Cluster, *words: str) -> str:
    """What the command prints about the cluster."""
    asked = subprocess.run(
        [sys.executable, "-m", "dualpath_sgl.cli", *words, "--run-dir", str(cluster.run_dir)],
        env=os.environ | {"COLUMNS": "160"},
        capture_output=True,
        text=True,
    )
    assert asked.returncode == 0, asked.stderr
    return asked.stdout


def test_every_request_is_placed_by_the_scheduler_and_every_room_closes(cluster, sessions, reference):
    placed = samples(f"{cluster.url}/metrics", "dualpath_router_placements_total")
    assert {one.labels["placed_by"] for one in placed if one.value} == {"scheduler"}
    deadline_s = time.monotonic() + WAIT_S
    while (status := seen(cluster)).rooms_open or any(one.load.sequences for one in status.engines):
        assert time.monotonic() < deadline_s, status
        time.sleep(0.2)
    assert status.rooms_closed > 0 and status.rooms_forgotten == 0 and status.errors == 0
    assert status.fallbacks == {} and set(status.paths) <= {Path.PREFILL, Path.NONE}
    assert status.paths[Path.PREFILL] > 0, "the scheduler hears what is stored"
    assert {one.engine.engine_id: one.engine.mode for one in status.engines} == {
        "prefill-0": EngineMode.RELAY,
        "decode-0": EngineMode.RELAY,
    }
    prefill = next(one.load for one in status.engines if one.engine.role is Role.PREFILL)
    assert prefill.read_rate_bytes_per_s > 0 and prefill.compute_rate_tokens_per_s > 0
    assert (prefill.held, prefill.read_queue_bytes, prefill.faults) == (0, 0, 0)


def test_relays_come_back_to_a_scheduler_that_was_restarted(cluster):
    cluster.restart("scheduler")
    deadline_s = time.monotonic() + WAIT_S
    while not (relays := seen(cluster).relays) or not relays[0].load.clients:
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
    assert relays[0].relay.endpoint == cluster.relays[0].endpoint


def seen(cluster: Cluster) -> Status:
    with cluster.ask_scheduler() as client:
        return client.status(10)


def test_status_shows_the_relay_and_where_it_is_asked(cluster):
    found = json.loads(dualpath(cluster, "status", "--json"))
    relay = found["processes"]["relay-0"]
    assert (relay["state"], relay["address"]) == ("running", cluster.relays[0].endpoint)
    assert [one["relay"] for one in found["scheduler"]["relays"]] == ["relay-0"]


def relay_metric(cluster: Cluster, name: str, **labels: str) -> float:
    """Sum over the relays and over other labels."""
    return total((relay.metrics_url for relay in cluster.relays), name, **labels)
