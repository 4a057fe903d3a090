"""Every load path of a real cluster gives the single server's tokens, and reads what it should."""

from __future__ import annotations

import json
import secrets
import time

import pytest
from scrapes import samples, total, wait_for

from dualpath_sgl.evals.agents.sessions import (
    SETTLE_TIMEOUT_S,
    TURNS,
    Session,
    forget_caches,
    generate,
    play_all,
    reads,
    settled_status,
)
from dualpath_sgl.launch.supervision.cluster import Cluster
from scheduler_svc.wire.protocol import Path, Role


def played_from_store(cluster: Cluster, sessions: list[Session], reference: dict) -> None:
    """Every turn of every session, all engines' own caches emptied before each."""
    for turn in range(TURNS):
        forget_caches(cluster)
        play_all(cluster.url, sessions, turn)
    assert {session.name: session.answers for session in sessions} == reference


def test_the_prefill_path_reads_the_store_on_the_prefill_engine_only(cluster, sessions, reference):
    cluster.set_policy("prefill")
    played_from_store(cluster, sessions, reference)
    counted = reads(cluster)
    assert counted.prefill_store_bytes > 0
    assert counted.decode_store_bytes == 0
    assert counted.forwarded_bytes == 0
    assert counted.fallbacks == 0


def test_the_decode_path_reads_the_store_on_the_decode_engine_only(cluster, sessions, reference):
    cluster.set_policy("decode")
    played_from_store(cluster, sessions, reference)
    counted = reads(cluster)
    assert counted.prefill_store_bytes == 0
    assert counted.decode_store_bytes > 0
    assert counted.forwarded_bytes == counted.decode_store_bytes
    assert counted.paths[Path.DECODE] >= len(sessions) * (TURNS - 1)
    assert counted.fallbacks == 0


@pytest.mark.parametrize("policy", ["round_robin", "shorter_queue"])
def test_mixed_paths_read_every_page_once(cluster, sessions, reference, policy):
    cluster.set_policy(policy)
    played_from_store(cluster, sessions, reference)
    counted = reads(cluster)
    assert counted.prefill_store_bytes > 0
    assert counted.decode_store_bytes > 0
    assert counted.forwarded_bytes == counted.decode_store_bytes
    assert counted.duplicate_store_pages == 0
    assert counted.fallbacks == 0


def test_pages_the_decode_engine_still_holds_are_forwarded_without_a_storage_read(
    cluster, sessions, reference
):
    cluster.set_policy("decode")
    for turn in range(TURNS):
        forget_caches(cluster, "prefill")
        play_all(cluster.url, sessions, turn)
        if turn == 0:
            before = reads(cluster)  # the first turn finds what other tests stored
    after = reads(cluster)
    assert {session.name: session.answers for session in sessions} == reference
    assert after.forwarded_bytes > before.forwarded_bytes
    assert after.decode_store_bytes == before.decode_store_bytes
    assert after.prefill_store_bytes == before.prefill_store_bytes


def test_needed_pages_are_those_held_forwarded_read_or_recomputed(cluster, config, sessions):
    cluster.set_policy("round_robin")
    port = [next(engine.url for engine in cluster.engines if engine.role == Role.PREFILL) + "/metrics"]

    def counted() -> dict[str, float]:
        """Pages by source, of all prompts, needed ones; bytes."""
        pages = {one.labels["source"]: one.value for one in samples(port[0], "dualpath_rank_pages_total")}
        names = ("prompt_pages_total", "needed_pages_total")
        return pages | {name: total(port, f"dualpath_rank_{name}") for name in names} | {
            f"{source}_bytes": total(port, "dualpath_rank_kv_bytes_total", source=source) for source in pages
            if source != "recomputed"
        }  # fmt: skip

    forget_caches(cluster)  # of idle engines: nothing earlier is counted later
    before = counted()
    for turn in range(TURNS):
        if turn == TURNS - 1:
            forget_caches(cluster)
        play_all(cluster.url, sessions, turn)
    prompts = [len(session.prompt(turn)) for session in sessions for turn in range(TURNS)]
    pages = sum(tokens // config.page_size for tokens in prompts)
    wait_for(lambda: counted()["prompt_pages_total"] - before["prompt_pages_total"], pages)
    grown = {name: value - before[name] for name, value in counted().items()}
    held = grown["device"] + grown["host"]
    assert held and grown["peer"] and grown["store"]
    assert grown["needed_pages_total"] == held + grown["peer"] + grown["store"] + grown["recomputed"]
    assert grown["recomputed"] == 0
    page_bytes = settled_status(cluster).engines[0].engine.page_bytes
    assert all(grown[f"{source}_bytes"] == grown[source] * page_bytes for source in ("peer", "store"))
    assert total(port, "dualpath_rank_faults_total") == 0


def test_idle_engines_report_their_whole_device_memory_as_free(cluster, config, sessions):
    for session in sessions:
        session.play(cluster.url, 0)
    whole = {"prefill": config.prefill.max_total_tokens, "decode": config.decode.max_total_tokens}
    deadline_s = time.monotonic() + SETTLE_TIMEOUT_S
    while True:
        engines = settled_status(cluster).engines
        free = {entry.engine.role.value: entry.load.device_free_tokens for entry in engines}
        if free == whole:
            return
        assert time.monotonic() < deadline_s, f"{free} of {whole} tokens are free"
        time.sleep(0.1)


def test_one_trace_shows_every_stage_of_a_request_on_the_decode_path(cluster, sessions):
    cluster.set_policy("decode")
    session = sessions[0]
    session.play(cluster.url, 0)
    forget_caches(cluster)
    trace_id = secrets.token_hex(16)
    # New tokens behind a stored prefix: something to read, to compute, to send and to persist.
    prompt = session.prompt(1) + [index % 250 for index in range(64)]
    generate(cluster.url, prompt, f"00-{trace_id}-{secrets.token_hex(8)}-01")
    wanted = {
        "plan", "storage.read", "forward", "load_back", "prefill", "kv_send", "restore", "persist",
    }  # fmt: skip
    deadline_s = time.monotonic() + 30
    while wanted - (seen := span_names(cluster, trace_id)):
        assert time.monotonic() < deadline_s, f"no span {wanted - seen}; seen {seen}"
        time.sleep(0.5)


def span_names(cluster: Cluster, trace_id: str) -> set[str]:
    names = set()
    for line in cluster.spans_path.read_text().splitlines():
        if trace_id in line:
            for resource in json.loads(line)["resourceSpans"]:
                for scope in resource["scopeSpans"]:
                    names |= {span["name"] for span in scope["spans"] if span["traceId"] == trace_id}
    return names
