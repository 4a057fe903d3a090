"""Whatever an engine does, the client gets an answer or a clear error, and nothing is left running."""

from __future__ import annotations

import pytest
from faulty_engine import (
    broken,
    busy,
    die,
    event,
    fail_inside_the_stream,
    hang,
    one_chunk_then_wait,
    wrong_request,
    wrong_request_inside_the_stream,
)
from otlp_collector import attributes
from router_world import Router, World

from scheduler_svc.wire.protocol import Role


@pytest.fixture
def router(world: World) -> Router:
    return world.placing_router()


def error_of(answer) -> dict:
    assert answer.headers["Content-Type"] == "application/json"
    return answer.json["error"]


@pytest.mark.parametrize("name", ["p0", "d0"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_takes_no_connection_is_left_out(world, router, name, stream):
    world.engines[name].refuse()
    for _ in range(4):
        answer = router.ask(stream=stream)
        assert answer.status == 200, answer.content
    assert not world.engines[name].seen


@pytest.mark.parametrize("name", ["p0", "d0"])
def test_a_busy_engine_is_passed_over_for_this_request_only(world, router, name):
    other = world.engines[name[0] + "1"]
    world.engines[name].behaviour = busy
    answers = [router.ask() for _ in range(4)]
    assert [answer.status for answer in answers] == [200] * 4
    assert len(world.engines[name].seen) >= 2, "it is asked again for the next request"
    assert len(other.seen) == 4
    retried = [answer for answer in answers if attempts(world, answer) == 2]
    assert len(retried) == len(world.engines[name].seen)


def attempts(world: World, answer) -> int:
    (route,) = world.spans(answer, "dualpath-router/route")["dualpath-router/route"]
    return attributes(route)["dualpath.attempts"]


def test_a_second_attempt_has_another_room(world, router):
    world.let_all(Role.PREFILL, busy)
    assert router.ask().status == 503
    rooms = {seen.body["bootstrap_room"] for engine in world.of(Role.PREFILL) for seen in engine.seen}
    assert len(rooms) == 2


@pytest.mark.parametrize("role", list(Role))
def test_no_engine_that_takes_requests_is_a_503_that_names_them(world, router, role):
    world.let_all(role, busy)
    answer = router.ask()
    assert answer.status == 503
    error = error_of(answer)
    assert (error["type"], error["code"]) == ("no_engine", 503)
    assert f"no {role} engine takes requests" in error["message"]
    assert all(engine.url in error["message"] for engine in world.of(role))
    assert answer.headers["Retry-After"] == "1"


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("fault", [die, broken])
@pytest.mark.parametrize("stream", [False, True])
def test_when_one_half_fails_the_other_ends_at_once_with_a_502(world, router, role, fault, stream):
    other = Role.DECODE if role is Role.PREFILL else Role.PREFILL
    world.let_all(role, fault)
    world.let_all(other, hang)  # as SGLang's engines do: one waits for the other
    answer = router.ask(stream=stream)
    assert answer.status == 502
    assert error_of(answer)["type"] == "engine_failed"
    assert f"{role} engine http://127.0.0.1:" in error_of(answer)["message"]
    (waiting,) = [engine for engine in world.of(other) if engine.seen]
    assert waiting.was_given_up()


def test_an_engine_that_failed_a_request_gives_it_to_nobody_else(world, router):
    """The request may be what broke it."""
    world.let_all(Role.PREFILL, die)
    world.let_all(Role.DECODE, hang)
    assert router.ask().status == 502
    assert sum(len(engine.seen) for engine in world.of(Role.PREFILL)) == 1


def test_an_error_inside_the_prefill_engines_stream_ends_the_request(world, router):
    world.let_all(Role.PREFILL, fail_inside_the_stream)
    world.let_all(Role.DECODE, hang)
    answer = router.ask(stream=True)
    assert answer.status == 502
    assert "out of host memory" in error_of(answer)["message"]


@pytest.mark.parametrize("role", list(Role))
def test_an_engine_that_hangs_is_given_up_when_its_health_checks_fail(world, router, role):
    for engine in world.engines.values():
        engine.behaviour = hang
    for engine in world.of(role):
        engine.health = None
    answer = router.ask()
    assert answer.status == 502
    assert "/health does not answer within 1 s" in error_of(answer)["message"]
    for engine in world.engines.values():
        assert not engine.seen or engine.was_given_up()


def test_what_the_engines_call_a_wrong_request_is_passed_on_unchanged(world, router):
    world.let_all(Role.PREFILL, wrong_request)
    world.let_all(Role.DECODE, wrong_request)
    answer = router.ask()
    assert answer.status == 400
    assert answer.json == {"error": {"message": "temperature is -1"}}
    assert sum(len(engine.seen) for engine in world.of(Role.PREFILL)) == 1


def test_a_wrong_request_is_passed_on_unchanged_inside_a_stream_too(world, router):
    world.let_all(Role.PREFILL, wrong_request_inside_the_stream)
    world.let_all(Role.DECODE, hang)
    answer = router.ask(stream=True)
    assert answer.status == 200
    assert answer.content == event({"error": {"message": "prompt too long", "code": 400}})


def test_a_body_that_is_no_json_object_is_a_400(world, router):
    answer = router.send(b"[1]")
    assert answer.status == 400
    assert error_of(answer)["message"] == "the body must be a JSON object, got list"
    assert router.send(b"{").status == 400


def test_a_request_that_takes_too_long_is_a_504_and_ends_on_both_engines(world):
    router = world.strict_router()
    for engine in world.engines.values():
        engine.behaviour = hang
    answer = router.ask()
    assert answer.status == 504
    assert error_of(answer)["type"] == "time_limit"
    for engine in world.engines.values():
        assert not engine.seen or engine.was_given_up()


def test_a_stream_that_takes_too_long_ends_with_an_error_event(world):
    router = world.strict_router()
    world.let_all(Role.DECODE, one_chunk_then_wait)
    answer = router.ask(stream=True)
    assert answer.status == 200
    events = answer.content.split(b"\n\n")
    assert events[0] == b'data: {"chunk": 0}'
    assert b'"code":504' in events[1] and events[2] == b"data: [DONE]"


def test_with_retries_off_a_refusal_is_final(world):
    router = world.strict_router()
    world.let_all(Role.DECODE, busy)
    assert router.ask().status == 503
    assert sum(len(engine.seen) for engine in world.of(Role.DECODE)) == 1


def test_a_returned_engine_is_used_again(world, router):
    world.p0.refuse()
    for _ in range(2):
        assert router.ask().status == 200
    world.p0.listen()
    world.wait_until_up(router)
    for _ in range(4):
        assert router.ask().status == 200
    assert world.p0.seen
