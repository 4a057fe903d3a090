"""The client's key and query reach the engines on every path, and what an engine says of them comes back."""

from __future__ import annotations

import json

import pytest
from router_world import Router, World

KEY = {"Authorization": "Bearer secret"}
EVERY_ENGINE = {"p0", "p1", "d0", "d1"}


@pytest.fixture
def router(world: World) -> Router:
    router = world.placing_router()
    world.wait_until_placed(router)
    return router


@pytest.mark.case("router_api_key_passthrough")
def test_engines_with_a_key_serve_every_path_to_a_client_that_has_it_and_no_other(world, router):
    for engine in world.engines.values():
        engine.api_key = "secret"
    calls = [
        (router.get, "/v1/models"),
        (router.get, "/model_info"),
        (router.get, "/server_info"),
        (router.get, "/health_generate"),
        (router.post, "/flush_cache"),
    ]
    assert {path: call(path, KEY).status for call, path in calls} == {path: 200 for _, path in calls}
    assert {path: call(path).status for call, path in calls} == {path: 401 for _, path in calls}
    refusal = router.post("/flush_cache").json["error"]
    assert (refusal["type"], refusal["code"]) == ("engine_refused", 401)
    assert world.d0.url in refusal["message"]


def test_headers_and_query_go_on_as_they_came_to_every_engine(world, router):
    query = "timeout=30&note=a%2Fb+c%20d"
    assert router.post(f"/flush_cache?{query}", KEY | {"X-API-Key": "k"}).status == 200
    assert {name for name, engine in world.engines.items() if engine.calls} == EVERY_ENGINE
    for engine in world.engines.values():
        (call,) = engine.calls
        assert (call.method, call.path_and_query) == ("POST", f"/flush_cache?{query}")
        headers = {name.lower(): value for name, value in call.headers.items()}
        assert (headers["authorization"], headers["x-api-key"]) == ("Bearer secret", "k")
    assert router.get("/v1/models?a=1").status == 200
    asked = [call for engine in world.engines.values() for call in engine.calls[1:]]
    assert [call.path_and_query for call in asked] == ["/v1/models?a=1"]


def test_a_generating_request_keeps_its_query(world, router):
    assert router.ask("/generate?user=ada").status == 200
    seen = [seen for engine in world.engines.values() for seen in engine.seen]
    assert [one.query for one in seen] == ["user=ada"] * 2


def test_an_engine_that_failed_is_told_before_one_that_wants_a_key(world, router):
    world.d1.api_key = "other"
    world.p0.health = 500
    answer = router.post("/flush_cache", KEY)
    assert (answer.status, answer.json["error"]["type"]) == (502, "engine_failed")
    assert world.d1.url in answer.json["error"]["message"] and world.p0.url in answer.json["error"]["message"]


def test_a_client_cannot_choose_room_bootstrap_or_dp_rank(world, router):
    chosen = {
        "X-Override-Bootstrap-Room": "7",
        "X-Override-Bootstrap-Host": "evil",
        "X-Override-Bootstrap-Port": "1",
        "X-Override-Routed-DP-Rank": "1",
        "X-Override-Disagg-Prefill-DP-Rank": "1",
        "X-Data-Parallel-Rank": "1",
    }
    body = {
        "bootstrap_room": 7,
        "bootstrap_host": "evil",
        "bootstrap_port": [1],
        "routed_dp_rank": 1,
        "data_parallel_rank": 1,
        "disagg_prefill_dp_rank": 1,
    }
    assert router.ask(headers=chosen, **body).status == 200
    seen = [seen for engine in world.engines.values() for seen in engine.seen]
    assert len(seen) == 2
    for one in seen:
        assert not {name.lower() for name in one.headers} & {name.lower() for name in chosen}
        assert (one.body["bootstrap_host"], one.body["bootstrap_port"]) == ("127.0.0.1", 9000)
        assert one.body["bootstrap_room"] != 7
        assert not one.body.keys() & {"routed_dp_rank", "data_parallel_rank", "disagg_prefill_dp_rank"}


def test_engines_are_told_the_dp_ranks_that_the_scheduler_chose(world, router):
    world.p0.dp_rank, world.d0.dp_rank = 2, 5
    world.registered = [world.p0, world.d0]
    world.restart_scheduler()
    world.wait_for_engines()
    world.wait_until_placed(router)
    answer = router.ask()
    assert world.placed_by(answer) == "scheduler"
    (prefill,), (decode,) = world.p0.seen, world.d0.seen
    assert (prefill.body["routed_dp_rank"], prefill.body["disagg_prefill_dp_rank"]) == (2, 2)
    assert (decode.body["routed_dp_rank"], decode.body["disagg_prefill_dp_rank"]) == (5, 2)
    assert prefill.body["bootstrap_room"] == decode.body["bootstrap_room"]


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses", "/v1/completions"])
def test_every_path_that_generates_reaches_both_engines_in_one_room(world, router, path):
    assert router.ask(path, max_tokens=3).status == 200
    seen = [one.body for engine in world.engines.values() for one in engine.seen]
    assert len(seen) == 2 and seen[0] == seen[1]
    assert seen[0]["max_tokens"] == 3 and seen[0]["bootstrap_host"] == "127.0.0.1"


def test_what_every_engine_answers_alike_one_engine_is_asked(world, router):
    assert router.ask("/v1/messages/count_tokens", KEY, messages=[]).content in (b"p0", b"p1")
    assert router.get("/v1/models/a%2Fb").status == 200
    counted, model = [call for engine in world.engines.values() for call in engine.calls]
    assert json.loads(counted.content) == {"text": "hello", "messages": []}
    assert counted.headers["Authorization"] == "Bearer secret"
    assert model.path_and_query == "/v1/models/a%2Fb"


def test_what_all_engines_must_do_all_are_asked_with_the_same_body(world, router):
    assert router.ask("/abort_request", rid="a").status == 200
    calls = [call for engine in world.engines.values() for call in engine.calls]
    assert [json.loads(call.content)["rid"] for call in calls] == ["a"] * 4


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/v1/embeddings", "only generate together"),
        ("/v1/score", "only generate together"),
        ("/api/chat", "use /v1/chat/completions"),
        ("/update_weights_from_disk", "send it to each engine"),
        ("/v1/responses/resp_1/cancel", "not kept"),
        ("/open_session", "X-Session-Id"),
    ],
)
def test_what_a_pair_cannot_serve_is_refused_with_the_reason(world, router, path, why):
    answer = router.ask(path)
    assert (answer.status, answer.json["error"]["type"]) == (400, "bad_request")
    assert why in answer.json["error"]["message"] and path in answer.json["error"]["message"]


def test_an_unknown_path_and_a_wrong_method_get_json(world, router):
    missing = router.get("/v2/nothing")
    assert (missing.status, missing.json["error"]["type"]) == (404, "not_found")
    wrong = router.get("/generate")
    assert (wrong.status, wrong.json["error"]["type"]) == (405, "wrong_method")
    assert "POST" in wrong.headers["Allow"]
    assert router.get("/v1/messages").json == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": "GET /v1/messages: use POST"},
    }


@pytest.mark.parametrize("field", [{"previous_response_id": "resp_1"}, {"background": True}])
def test_a_response_that_would_have_to_be_kept_is_refused(world, router, field):
    answer = router.ask("/v1/responses", input="a", **field)
    assert answer.status == 400 and next(iter(field)) in answer.json["error"]["message"]
    assert router.ask("/v1/responses", input="a", previous_response_id=None, background=False).status == 200
