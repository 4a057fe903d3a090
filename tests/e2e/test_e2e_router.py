"""The placing router in front of real engines: a second one beside the cluster's own router."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from doc_pages import PAGES, request, shell_commands

from dualpath_sgl.evals.agents.sessions import TURNS, forget_caches, generate, play_all, reads
from dualpath_sgl.evals.compare.measure import counter
from dualpath_sgl.launch.config.cluster import Router, RouterKind
from dualpath_sgl.launch.processes import commands
from dualpath_sgl.launch.processes.ports import FreePorts
from dualpath_sgl.launch.processes.process import ManagedProcess
from dualpath_sgl.launch.supervision.cluster import Cluster
from scheduler_svc.wire.protocol import Role

WAIT_S = 60.0


@pytest.fixture(scope="module")
def placing(cluster: Cluster) -> Iterator[str]:
    """Its URL."""
    cluster.set_policy("split")
    config = cluster.config.model_copy(update={"router": Router(kind=RouterKind.PLACING)})
    port = FreePorts(config.host).take()
    argv = cluster.processes["router"].argv
    listed = argv[argv.index("--prefill") : argv.index(f"--host={config.host}")]
    flags = commands.placing_flags(config, cluster.addresses, cluster.ports)
    router = ManagedProcess(
        "placing-router",
        [*argv[: argv.index("--prefill")], *listed, f"--host={config.host}", f"--port={port}", *flags],
        os.environ,
        cluster.run_dir / "logs" / "placing-router.log",
    )
    router.start()
    url = f"http://{config.host}:{port}"
    try:
        deadline_s = time.monotonic() + WAIT_S
        while not answers(url):
            assert router.running and time.monotonic() < deadline_s, router.tail()
            time.sleep(0.2)
        yield url
    finally:
        router.terminate()
        router.finish(time.monotonic() + 10)


def answers(url: str) -> bool:
    try:
        return bool(generate(url, [1, 2, 3, 4]))
    except OSError:
        return False


def test_sessions_through_the_placing_router_get_the_single_servers_tokens(
    cluster, placing, sessions, reference
):
    for turn in range(TURNS):
        forget_caches(cluster)
        play_all(placing, sessions, turn)
    assert {session.name: session.answers for session in sessions} == reference
    counted = reads(cluster)
    assert counted.prefill_store_bytes + counted.decode_store_bytes > 0
    assert counted.duplicate_store_pages == 0
    assert counted.fallbacks == 0


def test_the_requests_that_the_documentation_shows_are_answered_by_both_routers(cluster, placing):
    shown = [line.words for page in PAGES for line in shell_commands(page) if line.words[0] == "curl"]
    assert {request(words).path for words in shown} == {"/v1/chat/completions", "/generate"}
    for url in (cluster.url, placing):
        for words in shown:
            path, body = request(words)
            connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=WAIT_S)
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            answer = json.loads(connection.getresponse().read())
            connection.close()
            text = answer["text"] if path == "/generate" else answer["choices"][0]["message"]["content"]
            assert isinstance(text, str) and text


def test_router_scheduler_and_both_engines_are_in_the_callers_trace(cluster, placing, sessions):
    trace_id = secrets.token_hex(16)
    generate(placing, sessions[0].prompt(0), f"00-{trace_id}-{secrets.token_hex(8)}-01")
    wanted = {
        "dualpath-router/route", "dualpath-router/place", "dualpath-router/upstream",
        "dualpath-scheduler/place", "dualpath-scheduler/plan",
    }  # fmt: skip
    deadline_s = time.monotonic() + WAIT_S
    while True:
        seen = services_and_spans(cluster, trace_id)
        if not wanted - seen and {"prefill-0", "decode-0"} <= {one.split("/")[0] for one in seen}:
            return
        assert time.monotonic() < deadline_s, f"seen only {sorted(seen)}"
        time.sleep(0.5)


def services_and_spans(cluster: Cluster, trace_id: str) -> set[str]:
    found = set()
    for line in cluster.spans_path.read_text().splitlines():
        if trace_id not in line:
            continue
        for resource in json.loads(line)["resourceSpans"]:
            attributes = {item["key"]: item["value"] for item in resource["resource"]["attributes"]}
            for scope in resource["scopeSpans"]:
                for span in scope["spans"]:
                    if span["traceId"] == trace_id:
                        found.add(f"{attributes['service.name']['stringValue']}/{span['name']}")
    return found


def test_a_client_that_leaves_in_the_middle_of_a_long_answer_aborts_it_on_the_decode_engine(cluster, placing):
    (decode,) = [engine.url for engine in cluster.engines if engine.role is Role.DECODE]
    before = aborted(decode)
    sampling = {"temperature": 0, "max_new_tokens": 4000, "ignore_eos": True}
    body = {"input_ids": list(range(200)), "sampling_params": sampling, "stream": True}
    connection = http.client.HTTPConnection(urlsplit(placing).netloc, timeout=WAIT_S)
    connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
    assert connection.getresponse().readline().startswith(b"data: ")
    connection.close()
    deadline_s = time.monotonic() + WAIT_S
    while aborted(decode) == before:
        assert time.monotonic() < deadline_s, "the decode engine goes on for nobody"
        time.sleep(0.2)


def aborted(engine_url: str) -> float:
    return sum(counter(engine_url, "sglang:num_aborted_requests_total"))
