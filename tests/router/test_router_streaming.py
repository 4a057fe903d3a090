"""Chunks pass as they come, in both directions of failure, and traces pass through."""

from __future__ import annotations

import http.client
import json
import time
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
from faulty_engine import answer as good_answer
from faulty_engine import die, die_mid_stream, hang, one_chunk_then_wait, stream_without_end
from otlp_collector import attributes
from router_world import Router, World

from scheduler_svc.wire.protocol import Role

WAIT_S = 30


@pytest.fixture
def router(world: World) -> Router:
    return world.placing_router()


@contextmanager
def open_stream(router: Router):
    """A streamed request whose answer is read piece by piece."""
    connection = http.client.HTTPConnection(urlsplit(router.url).netloc, timeout=WAIT_S)
    body = json.dumps({"text": "hello", "stream": True})
    connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
    try:
        yield connection
    finally:
        connection.close()


def test_the_first_chunk_is_there_before_the_second_is_made(world, router):
    for engine in world.of(Role.DECODE):
        engine.behaviour = one_chunk_then_wait
    with open_stream(router) as connection:
        response = connection.getresponse()
        assert response.getheader("Content-Type") == "text/event-stream"
        assert response.read1() == b'data: {"chunk": 0}\n\n'
        for engine in world.of(Role.DECODE):
            engine.release()
        assert response.read() == b'data: {"chunk": 1}\n\n'


def test_a_client_that_leaves_before_the_first_chunk_ends_both_halves(world, router):
    for engine in world.engines.values():
        engine.behaviour = hang
    with open_stream(router):
        seen = [world.wait_until_any_seen(role) for role in Role]
    assert all(engine.was_given_up() for engine in seen)


@pytest.mark.parametrize("decode", [one_chunk_then_wait, stream_without_end])
def test_a_client_that_leaves_in_the_middle_of_a_stream_ends_both_halves(world, router, decode):
    for engine in world.of(Role.PREFILL):
        engine.behaviour = hang
    for engine in world.of(Role.DECODE):
        engine.behaviour = decode
    with open_stream(router) as connection:
        assert connection.getresponse().readline()
        seen = [world.wait_until_any_seen(role) for role in Role]
    assert all(engine.was_given_up() for engine in seen)


def test_a_decode_engine_that_dies_mid_stream_ends_it_with_an_error_event(world, router):
    for engine in world.of(Role.DECODE):
        engine.behaviour = die_mid_stream
    answer = router.ask(stream=True)
    assert answer.status == 200
    *_, broken_event, error, done, rest = answer.content.split(b"\n\n")
    assert broken_event == b'data: {"text": "hal'
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == 502
    assert (done, rest) == (b"data: [DONE]", b"")


def test_a_prefill_engine_that_dies_after_the_first_token_harms_nobody(world, router):
    """It has handed over its KV: the DE answers alone."""
    for engine in world.of(Role.PREFILL):
        engine.behaviour = hang
    for engine in world.of(Role.DECODE):
        engine.behaviour = one_chunk_then_wait
    with open_stream(router) as connection:
        response = connection.getresponse()
        assert response.read1()
        world.wait_until_any_seen(Role.PREFILL).refuse()
        for engine in world.of(Role.DECODE):
            engine.release()
        assert response.read() == b'data: {"chunk": 1}\n\n'


def test_log_probabilities_of_the_prompt_come_from_the_prefill_engine(world, router):
    for engine in world.of(Role.PREFILL):
        engine.meta_info = {"input_token_logprobs": [1, 2]}
    for engine in world.of(Role.DECODE):
        engine.meta_info = {"input_token_logprobs": [3]}
    assert router.ask(return_logprob=True).json["meta_info"] == {"input_token_logprobs": [1, 2, 3]}


ROUTE, PLACE, UPSTREAM = (f"dualpath-router/{name}" for name in ("route", "place", "upstream"))


def test_the_clients_trace_is_continued_to_both_engines_and_every_step_has_a_span(world, router):
    answer = router.ask()
    found = world.spans(answer, ROUTE, PLACE, UPSTREAM, UPSTREAM)
    (route,), (place,) = found[ROUTE], found[PLACE]
    upstream = {attributes(span)["dualpath.role"]: span for span in found[UPSTREAM]}
    assert place.parent_span_id == route.span_id
    for role in Role:
        (engine,) = [engine for engine in world.of(role) if engine.seen]
        _, trace_id, span_id, _ = engine.seen[0].headers["traceparent"].split("-")
        assert trace_id == answer.trace_id
        assert span_id == upstream[role].span_id.hex()
        assert upstream[role].parent_span_id == route.span_id
        assert attributes(upstream[role])["dualpath.upstream.complete"]
    assert attributes(route)["http.response.status_code"] == 200


def test_a_failed_half_is_seen_in_its_span(world, router):
    for engine in world.of(Role.DECODE):
        engine.behaviour = die
    for engine in world.of(Role.PREFILL):
        engine.behaviour = hang
    found = world.spans(router.ask(), ROUTE, UPSTREAM, UPSTREAM)
    assert found[ROUTE][0].status.code == 2
    halves = {attributes(span)["dualpath.role"]: span for span in found[UPSTREAM]}
    assert halves["decode"].status.code == 2
    assert not attributes(halves["prefill"])["dualpath.upstream.complete"]


def test_without_a_clients_trace_both_engines_share_a_new_one(world, router):
    router.ask(headers={"traceparent": ""})
    seen = [engine.seen[0] for engine in world.engines.values() if engine.seen]
    assert len(seen) == 2
    assert len({one.headers["traceparent"].split("-")[1] for one in seen}) == 1


def test_headers_of_the_client_reach_the_engines(world, router):
    router.ask(headers={"Authorization": "Bearer key", "Accept-Encoding": "gzip"})
    for engine in world.engines.values():
        for seen in engine.seen:
            assert seen.headers["Authorization"] == "Bearer key"
            assert "Accept-Encoding" not in seen.headers


def test_bytes_that_are_no_text_in_a_header_are_not_passed_on_and_do_no_harm(world, router):
    strange = {"X-Session-Id": b"\xff\xfe", "X-Other": b"\xff", "X-Kept": "yes"}
    assert router.ask(headers=strange).status == 200
    for engine in world.engines.values():
        for seen in engine.seen:
            assert seen.headers["X-Kept"] == "yes" and "X-Other" not in seen.headers


def test_connections_to_the_engines_are_used_again(world, router):
    for _ in range(4):
        router.ask(headers={"X-Session-Id": "same pair"})
    for role in Role:
        engine = world.wait_until_any_seen(role)
        # A health check may hold one of them at that moment.
        assert len(engine.peers) <= 2, f"{engine.name} was reached over {len(engine.peers)} connections"


def test_models_caches_and_readiness_are_asked_of_the_engines(world, router):
    assert good_answer in {engine.behaviour for engine in world.engines.values()}
    assert router.get("/v1/models").content in {b"p0", b"p1"}
    assert router.ask("/flush_cache").status == 200
    world.d0.health = 500
    assert router.ask("/flush_cache").status == 502
    assert world.d0.url in error_message(router.ask("/flush_cache"))
    assert {engine["url"] for engine in router.get("/readiness").json["engines"]} == {
        engine.url for engine in world.engines.values()
    }


def error_message(answer) -> str:
    return answer.json["error"]["message"]


def test_nothing_is_counted_as_in_flight_once_every_client_has_its_answer_or_is_gone(world, router):
    for behaviour in (good_answer, die, hang):
        for engine in world.engines.values():
            engine.behaviour = behaviour
        with open_stream(router) as connection:
            if behaviour is not hang:
                connection.getresponse().read()
    deadline_s = time.monotonic() + WAIT_S
    while any(counts := [engine["in_flight"] for engine in router.get("/readiness").json["engines"]]):
        assert time.monotonic() < deadline_s, counts
        time.sleep(0.05)
