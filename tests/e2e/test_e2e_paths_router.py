"""The placing router in front of real engines: a second one beside the cluster's own router."""

from __future__ import annotations

import http.client
import json
import secrets
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from doc_pages import PAGES, request, shell_commands

from dualpath_sgl.evals.agents.sessions import TURNS, forget_caches, generate, play_all, reads
from dualpath_sgl.evals.clients.cases import CHAT, COMPLETIONS, GENERATE, MESSAGES, MODEL, TEXT, Case, ending
from dualpath_sgl.evals.clients.routers import placing_router
from dualpath_sgl.evals.clients.told import ask, problem_told
from dualpath_sgl.evals.compare.measure import counter
from dualpath_sgl.launch.supervision.cluster import Cluster
from scheduler_svc.http_place import PLACE_PATH
from scheduler_svc.wire.protocol import Role

WAIT_S = 60.0


@pytest.fixture(scope="module")
def placing(cluster: Cluster) -> Iterator[str]:
    """Its URL."""
    cluster.set_policy("split")
    with placing_router(cluster) as url:
        yield url


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
    curls = [line.words for page in PAGES for line in shell_commands(page) if line.words[0] == "curl"]
    shown = [words for words in curls if request(words).path != PLACE_PATH]
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
        "dualpath-scheduler/place", "dualpath-scheduler/plan", "dualpath/request",
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
                        name = span["name"].split(" ")[0]  # without a path, an id or a process
                        found.add(f"{attributes['service.name']['stringValue']}/{name}")
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


SHORT = {"temperature": 0, "max_new_tokens": 6}
MESSAGE = {"model": MODEL, "messages": [{"role": "user", "content": TEXT}], "temperature": 0, "max_tokens": 6}


def both(cluster: Cluster, placing: str) -> tuple[str, str]:
    return cluster.url, placing


@pytest.mark.parametrize("stream", [False, True])
def test_every_sample_is_answered_by_both_routers(cluster, placing, stream):
    for url in both(cluster, placing):
        sampled = {"text": TEXT, "stream": stream, "sampling_params": SHORT | {"n": 3}}
        answers = ask(url, Case("", GENERATE, sampled)).what
        alone = ask(url, Case("", GENERATE, {"text": TEXT, "sampling_params": SHORT})).what["output_ids"]
        found = answers.values() if stream else answers
        assert [answer["output_ids"] for answer in found] == [alone] * 3
        batch = {"model": MODEL, "prompt": [TEXT, TEXT[9:]], "temperature": 0, "max_tokens": 6}
        one, other = texts(ask(url, Case("", COMPLETIONS, batch)).what)
        sampled = batch | {"n": 2, "stream": stream}
        assert texts(ask(url, Case("", COMPLETIONS, sampled)).what) == [one, one, other, other]
        chats = texts(ask(url, Case("", CHAT, MESSAGE | {"n": 3, "stream": stream})).what)
        assert len(chats) == 3 and len(set(chats)) == 1


def texts(what: dict) -> list[str]:
    """Of all choices in their order, streamed or not."""
    choices = what.get("choices") or [what[name] for name in sorted(what) if name.startswith("choice")]
    said = [choice.get("text") or (choice.get("message") or choice["delta"])["content"] for choice in choices]
    assert all(said)
    return said


@pytest.mark.parametrize("case", ending(), ids=[case.name for case in ending()])
def test_what_would_end_both_engines_is_refused_through_both_routers(cluster, placing, case):
    for url in both(cluster, placing):
        assert ask(url, case).status == 400
        assert generate(url, [1, 2, 3, 4])


def test_a_prompt_that_the_decode_engine_could_never_take_in_is_refused_at_once(cluster, placing):
    fits_without_reserve = {"input_ids": [1] * 8000, "sampling_params": SHORT}
    for url in both(cluster, placing):
        told = ask(url, Case("", GENERATE, fits_without_reserve))
        assert "--num-reserved-decode-tokens" in (problem_told(told) or ""), told


def test_a_coding_agents_messages_are_answered_as_a_chat(placing):
    message = ask(placing, Case("", MESSAGES, MESSAGE))
    chat = ask(placing, Case("", CHAT, MESSAGE))
    (block,) = message.what["content"]
    assert block["text"] == chat.what["choices"][0]["message"]["content"]


def test_a_completions_echo_has_the_prompts_log_probabilities(placing):
    body = {"model": MODEL, "prompt": TEXT, "temperature": 0, "max_tokens": 4, "echo": True, "logprobs": 1}
    (choice,) = ask(placing, Case("", COMPLETIONS, body)).what["choices"]
    assert "".join(choice["logprobs"]["tokens"]).startswith(TEXT)
