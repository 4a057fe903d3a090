"""Every load path of a real cluster gives the single server's tokens, and reads what it should."""

from __future__ import annotations

import json
import secrets
import time

import pytest

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
from scheduler_svc.wire.protocol import Path


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
