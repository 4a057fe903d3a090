"""Every load path of a real cluster gives the single server's tokens, and reads what it should."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

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
from dualpath_sgl.evals.spans import jaeger
from dualpath_sgl.evals.spans.traces import Trace, parse
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


STAGES = {
    "load", "plan wait", "plan decode", "store to decode wait", "store to decode", "decode to prefill wait",
    "decode to prefill", "load_back", "restore", "persist", "request decode",
}  # fmt: skip
"""Of a request on the decode path with something to read, to compute, to send and to persist; SGLang's come on top."""


ROUNDED_US = 1
"""A span's begin and length are cut to whole microseconds, each for itself."""


@pytest.fixture
def long_prompt(cluster, sessions) -> list[int]:
    """New tokens behind a stored prefix; of another length than any other prompt."""
    cluster.set_policy("decode")
    sessions[0].play(cluster.url, 0)
    forget_caches(cluster)
    return sessions[0].prompt(1) + [secrets.randbelow(250) for _ in range(77)]


def test_one_trace_shows_every_stage_of_a_request_on_the_decode_path(cluster, long_prompt):
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    generate(cluster.url, long_prompt, f"00-{trace_id}-{span_id}-01")
    missing = f"parent span {span_id} was not received"
    until_traced(
        cluster, lambda trace: trace.traceID == trace_id, lambda roots: {*roots.values()} == {missing}
    )


def test_a_request_that_brings_no_trace_is_one_tree_with_its_path_on_the_root(cluster, long_prompt):
    """SGLang's Rust router makes no trace, so both engines make the same one of the room."""
    prompt = [*long_prompt, 1]  # the test before had one of the same length
    generate(cluster.url, prompt)
    trace = until_traced(
        cluster,
        lambda trace: prompt_tokens(trace) == len(prompt),
        lambda roots: roots == {"request decode": None},
    )
    root = next(span for span in trace.spans if not span.parents)
    assert {trace.service(span) for span in trace.spans} == {"prefill-0", "decode-0", "scheduler", "dualpath"}
    own = root.own
    assert own["path"] == "decode" and own["split.pages"] == own["hit.pages"] > 0
    assert own["prefill.read_bytes"] == 0 < own["decode.read_bytes"] == own["forwarded_bytes"]
    by_id = {span.spanID: span for span in trace.spans}
    for span in trace.spans:
        if span.operationName.startswith(("store to", "decode to", "plan wait")):
            load = by_id[span.parents[0]]
            assert load.operationName == "load"
            assert load.startTime <= span.startTime <= span.end <= load.end + ROUNDED_US


def test_probes_and_warm_ups_leave_no_trace(cluster):
    """Theirs has no room; each engine was asked for its health while it started."""
    requests = [span for trace in recorded(cluster) for span in trace.spans if " Req " in span.operationName]
    assert requests and all("bootstrap_room" in span.attributes for span in requests)


def recorded(cluster: Cluster) -> list[Trace]:
    return parse(jaeger.traces(jaeger.read_lines(cluster.spans_path)))


def prompt_tokens(trace: Trace) -> int | None:
    counts = (span.attributes.get("gen_ai.usage.input_tokens") for span in trace.spans)
    return next((count for count in counts if count is not None), None)


def until_traced(
    cluster: Cluster, is_it: Callable[[Trace], bool], has_its_roots: Callable[[dict[str, str | None]], bool]
) -> Trace:
    """The trace, once all STAGES and every parent have come.

    `has_its_roots` gets the names of spans without a parent here, and what the trace says of its absence.
    """
    deadline_s = time.monotonic() + 30
    while True:
        trace = next(filter(is_it, recorded(cluster)), None)
        spans = trace.spans if trace is not None else []
        seen = {span.operationName for span in spans}
        roots = {span.operationName: span.attributes.get("warning") for span in spans if not span.parents}
        if trace is not None and seen >= STAGES and has_its_roots(roots):
            return trace
        assert time.monotonic() < deadline_s, f"no span {STAGES - seen}; seen {seen}; roots {roots}"
        time.sleep(0.5)
