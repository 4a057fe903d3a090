"""Engines are chosen by the scheduler, and without it by the router itself."""

from __future__ import annotations

import signal

import pytest
from otlp_collector import attributes
from router_world import Router, World

from scheduler_svc.wire.protocol import Role


@pytest.fixture
def router(world: World) -> Router:
    router = world.placing_router()
    world.wait_until_placed(router)
    return router


def served_by(world: World) -> dict[Role, set[str]]:
    return {role: {engine.name for engine in world.of(role) if engine.seen} for role in Role}


def test_both_engines_get_the_request_with_the_room_and_the_prefill_engines_address(world, router):
    answer = router.ask(text="hello", sampling_params={"temperature": 0})
    assert answer.status == 200
    (prefill,) = [engine for engine in world.of(Role.PREFILL) if engine.seen]
    (decode,) = [engine for engine in world.of(Role.DECODE) if engine.seen]
    assert answer.json["text"] == decode.name
    assert prefill.seen[0].body == decode.seen[0].body
    body = prefill.seen[0].body
    assert (body["text"], body["sampling_params"]) == ("hello", {"temperature": 0})
    assert (body["bootstrap_host"], body["bootstrap_port"]) == ("127.0.0.1", 9000)
    assert 0 <= body["bootstrap_room"] < 2**63


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_openais_endpoints_are_placed_like_generate(world, router, path):
    answer = router.ask(path, messages=[{"role": "user", "content": "hello"}])
    assert answer.json["text"] in {"d0", "d1"}
    assert world.placed_by(answer) == "scheduler"


def test_the_scheduler_places_and_its_span_names_the_same_room(world, router):
    answer = router.ask()
    assert world.placed_by(answer) == "scheduler"
    spans = world.spans(answer, "dualpath-scheduler/place", "dualpath-router/route")
    (decided,), (route,) = spans["dualpath-scheduler/place"], spans["dualpath-router/route"]
    assert attributes(decided)["dualpath.room"] == attributes(route)["dualpath.room"]


@pytest.mark.parametrize(
    "named",
    [
        {"headers": {"X-Session-Id": "ada"}},
        {"headers": {"X-SMG-Routing-Key": "bob"}},
        {"session_id": "eve"},
        {"session_params": {"id": "kim"}},
    ],
    ids=["header", "routing key", "body", "session_params"],
)
def test_a_session_stays_with_its_engines(world, router, named):
    for _ in range(4):
        assert router.ask(**named).status == 200
    assert [len(names) for names in served_by(world).values()] == [1, 1]


def test_requests_without_a_session_are_spread(world, router):
    for _ in range(4):
        assert router.ask().status == 200
    assert served_by(world) == {Role.PREFILL: {"p0", "p1"}, Role.DECODE: {"d0", "d1"}}


def test_an_engine_that_joined_at_run_time_is_used(world):
    router = world.strict_router()
    world.registered = [world.p1, world.d1]
    world.restart_scheduler()
    world.wait_for_engines()
    world.wait_until_placed(router)
    world.mend_engines()
    assert router.ask().json["text"] == "d1"


def test_a_dead_scheduler_costs_no_request_and_is_used_again_after_its_return(world, router):
    world.scheduler.send_group(signal.SIGKILL)
    for _ in range(4):
        assert router.ask(headers={"X-Session-Id": "ada"}).status == 200
    assert served_by(world) == {Role.PREFILL: {"p0", "p1"}, Role.DECODE: {"d0", "d1"}}, "it takes turns"
    world.restart_scheduler()
    world.wait_for_engines()
    world.wait_until_placed(router)


def test_a_hung_scheduler_costs_no_request_and_is_used_again_when_it_answers(world, router):
    world.scheduler.send(signal.SIGSTOP)
    answers = [router.ask() for _ in range(3)]
    assert [answer.status for answer in answers] == [200] * 3
    assert {world.placed_by(answer) for answer in answers} == {"router"}
    # Only the first one asked: nobody waits for a scheduler that is known not to answer.
    waited = [world.spans(answer, "dualpath-router/place")["dualpath-router/place"][0] for answer in answers]
    reasons = [attributes(span)["dualpath.fallback.reason"] for span in waited]
    assert set(reasons) == {"scheduler does not answer"}
    world.scheduler.send(signal.SIGCONT)
    world.wait_until_placed(router)


def test_a_scheduler_without_engines_leaves_the_choice_to_the_router(world, router):
    world.registered = []
    world.restart_scheduler()
    world.wait_for_engines()
    answers = [router.ask() for _ in range(2)]
    assert [answer.status for answer in answers] == [200, 200]
    assert world.placed_by(answers[-1]) == "router"
