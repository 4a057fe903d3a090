"""What the router's `/metrics` says of requests that went well, badly, or twice."""

from __future__ import annotations

import http.client
import json
import secrets
import time
from collections import Counter
from urllib.parse import urlsplit

import pytest
from faulty_engine import (
    WAIT_S,
    busy,
    die,
    die_mid_stream,
    hang,
    one_chunk_then_wait,
    wrong_request,
)
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families
from router_world import STRICT_BODY_BYTES, Router, World

from scheduler_svc.wire.protocol import Role


@pytest.fixture
def router(world: World) -> Router:
    router = world.placing_router()
    world.wait_until_placed(router)
    return router


def scrape(router: Router) -> Counter:
    """Counts and sums by name and label values (ordered by label): `requests_total none 2xx`."""
    families = text_string_to_metric_families(router.get("/metrics").content.decode())
    return Counter(
        {
            " ".join([sample.name.removeprefix("dualpath_router_"), *sample.labels.values()]): sample.value
            for family in families
            for sample in family.samples
            if not sample.name.endswith("_bucket")
        }
    )


def settled(router: Router) -> Counter:
    """A request is counted after its client has everything: wait for those under way."""
    deadline_s = time.monotonic() + WAIT_S
    while (found := scrape(router))["requests_in_flight"]:
        assert time.monotonic() < deadline_s, found
        time.sleep(0.01)
    return found


def added(before: Counter, router: Router) -> dict[str, float]:
    """What was counted since `before`, without sums of times."""
    grown = settled(router) - before
    return {name: value for name, value in grown.items() if not name.split()[0].endswith("_sum")}


def test_a_good_request_is_counted_once_everywhere(world, router):
    before = settled(router)
    for stream in (False, True, True):
        assert router.ask(stream=stream).status == 200
    assert added(before, router) == {
        "requests_total none 2xx": 3,
        "request_seconds_count false": 1,
        "request_seconds_count true": 2,
        "first_byte_seconds_count false": 1,
        "first_byte_seconds_count true": 2,
        "placements_total scheduler": 3,
        "scheduler_seconds_count": 3,
    }


def test_a_slow_request_s_trace_is_named_beside_its_bucket(world, router):
    trace_id = secrets.token_hex(16)
    assert router.ask(headers={"traceparent": f"00-{trace_id}-{'b' * 16}-01"}).status == 200
    settled(router)
    text = router.get("/metrics", {"Accept": "application/openmetrics-text; version=1.0.0"}).content.decode()
    named = {
        family.name
        for family in openmetrics_families(text)
        for sample in family.samples
        if sample.exemplar and sample.exemplar.labels == {"trace_id": trace_id}
    }
    assert named == {"dualpath_router_request_seconds", "dualpath_router_first_byte_seconds"}


def test_a_streams_first_byte_is_earlier_than_its_end_and_it_is_in_flight_until_then(world, router):
    world.let_all(Role.DECODE, one_chunk_then_wait)
    before = settled(router)
    connection = http.client.HTTPConnection(urlsplit(router.url).netloc, timeout=WAIT_S)
    connection.request("POST", "/generate", json.dumps({"text": "hello", "stream": True}))
    response = connection.getresponse()
    assert response.read1()
    assert scrape(router)["requests_in_flight"] == 1
    for engine in world.of(Role.DECODE):
        engine.release()
    response.read()
    connection.close()
    grown = settled(router) - before
    assert grown["first_byte_seconds_sum true"] < grown["request_seconds_sum true"]


def test_a_request_that_a_busy_engine_refused_is_one_retry(world, router):
    before = settled(router)
    world.d0.behaviour = busy
    for _ in range(2):
        assert router.ask().status == 200
    counts = added(before, router)
    assert counts["retries_total decode"] == len(world.d0.seen) > 0
    assert counts["placements_total scheduler"] == 2
    assert counts["requests_total none 2xx"] == 2


@pytest.mark.parametrize(
    "prefill, decode, stream, counted",
    [
        (wrong_request, wrong_request, False, "none 4xx"),
        (busy, busy, False, "no_engine 5xx"),
        (hang, die, False, "engine_failed 5xx"),
        (None, die_mid_stream, True, "engine_failed 2xx"),
    ],
    ids=["engine answers 400", "all busy", "engine dies", "engine dies mid-stream"],
)
def test_what_a_client_was_told_is_counted_by_status_and_error(
    world, router, prefill, decode, stream, counted
):
    if prefill is not None:
        world.let_all(Role.PREFILL, prefill)
    world.let_all(Role.DECODE, decode)
    before = settled(router)
    router.ask(stream=stream)
    counts = added(before, router)
    assert {name for name in counts if name.startswith("requests_total")} == {f"requests_total {counted}"}
    assert counts.get("first_byte_seconds_count true", 0) == int(stream)


def test_a_client_that_leaves_is_counted_as_disconnected(world, router):
    for engine in world.engines.values():
        engine.behaviour = hang
    before = settled(router)
    connection = http.client.HTTPConnection(urlsplit(router.url).netloc, timeout=WAIT_S)
    connection.request("POST", "/generate", json.dumps({"text": "hello"}))
    for role in Role:
        world.wait_until_any_seen(role)
    connection.close()
    assert added(before, router)["requests_total disconnected none"] == 1


def test_without_the_scheduler_placements_are_the_routers_own(world, router):
    before = settled(router)
    world.scheduler.finish(0)
    assert router.ask().status == 200
    counts = added(before, router)
    assert counts["placements_total router"] == 1
    assert "scheduler_seconds_count" not in counts


def test_a_body_over_the_limit_is_a_413_that_names_the_option(world):
    router = world.strict_router()
    before = settled(router)
    answer = router.send(b" " * (2 * STRICT_BODY_BYTES))
    assert answer.status == 413
    assert answer.json["error"]["type"] == "too_large"
    assert "--max-payload-size" in answer.json["error"]["message"]
    assert added(before, router)["requests_total too_large 4xx"] == 1
