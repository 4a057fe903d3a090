from __future__ import annotations

import gc

import pytest
from msgspec.structs import replace
from scheduler_vocabulary import (
    PAGE_BYTES,
    cluster,
    decode_report,
    done,
    heartbeat,
    lane,
    plan_of,
    planned_bytes,
    prefill_report,
    receivers,
    snapshot,
)

from scheduler_svc.events import LaneInputs, PlanDecided, ReadEnded
from scheduler_svc.ledger.engines import ENGINE_EXPIRY_S, RankKey
from scheduler_svc.ledger.rooms import CLOSED_LINGER_S, ROOM_TTL_S
from scheduler_svc.planning import PLAN_DEADLINE_S
from scheduler_svc.state import MAX_FALLBACK_REASONS, Result
from scheduler_svc.wire.protocol import (
    Error,
    ErrorCode,
    Loaded,
    Path,
    Place,
    Placement,
    Role,
    StatusRequest,
    Workload,
)


def refused(state, message, now_s=0.0) -> Error:
    """Handle a message that must be refused, and check that it changed nothing."""
    state.expire(now_s)  # the passing of time is not the message's doing
    before, errors = snapshot(state), state.errors
    result = state.handle(message, now_s)
    assert isinstance(result.reply, Error), result
    assert not result.pushes and not result.events
    assert snapshot(state) == before
    assert state.errors == errors + 1
    return result.reply


def beat_all(state, now_s, *names):
    for name in names or ("p0", "d0"):
        state.handle(heartbeat(name), now_s)


# Plans


@pytest.mark.parametrize("prefill_first", [True, False])
def test_the_plan_goes_to_both_engines_when_the_second_report_is_in(prefill_first):
    state = cluster("decode")
    messages = [prefill_report(7, 2, 10), decode_report(7, 4)]
    first, second = messages if prefill_first else reversed(messages)
    assert state.handle(first, 0.0) == Result()
    result = state.handle(second, 0.1)
    assert receivers(result) == [("p0", 0), ("d0", 0)]
    plan = plan_of(result)
    assert (plan.path, plan.split_page, plan.hit_pages) == (Path.DECODE, 10, 10)
    assert (plan.prefill_local_pages, plan.decode_local_pages) == (2, 4)
    assert plan.decode_endpoints == ("tcp://d0:1000",)
    assert state.paths == {Path.DECODE: 1}


@pytest.mark.parametrize(
    ("policy", "prefill_local", "hit", "decode_local", "path", "split"),
    [
        ("prefill", 0, 10, 0, Path.PREFILL, 0),
        ("prefill", 0, 10, 4, Path.PREFILL, 4),
        ("decode", 0, 10, 4, Path.DECODE, 10),
        ("decode", 0, 10, 10, Path.PREFILL, 10),
        ("decode", 0, 10, 15, Path.PREFILL, 10),
        ("decode", 10, 10, 4, Path.NONE, 4),
        ("decode", 0, 0, 4, Path.NONE, 0),
    ],
)
def test_the_path_is_named_after_who_reads_the_store(policy, prefill_local, hit, decode_local, path, split):
    state = cluster(policy)
    state.handle(prefill_report(1, prefill_local, hit), 0.0)
    plan = plan_of(state.handle(decode_report(1, decode_local), 0.0))
    assert (plan.path, plan.split_page) == (path, split)


def test_a_duplicate_report_gets_the_same_plan_again_and_nobody_else_does():
    state = cluster("round_robin")
    state.handle(prefill_report(1, 0, 10), 0.0)
    plan = plan_of(state.handle(decode_report(1, 0), 0.0))
    again = state.handle(prefill_report(1, 0, 10), 0.5)
    assert receivers(again) == [("p0", 0)] and plan_of(again) == plan
    assert not again.events
    assert sum(state.paths.values()) == 1


def test_every_rank_gets_the_plan_early_or_late():
    ranks = [heartbeat(name, rank=rank, tp_size=2) for name in ("p0", "d0") for rank in (0, 1)]
    state = cluster("decode", *ranks)
    state.handle(prefill_report(1, 0, 10, rank=0), 0.0)
    state.handle(prefill_report(1, 0, 10, rank=1), 0.0)
    result = state.handle(decode_report(1, 0, rank=1), 0.0)
    assert receivers(result) == [("p0", 0), ("p0", 1), ("d0", 1)]
    late = state.handle(decode_report(1, 0, rank=0), 0.0)
    assert receivers(late) == [("d0", 0)] and plan_of(late) == plan_of(result)
    assert plan_of(result).decode_endpoints == ("tcp://d0:1000", "tcp://d0:1001")


def test_the_event_of_a_plan_carries_the_callers_trace_and_both_times():
    state = cluster()
    state.handle(decode_report(1, 0, traceparent="from-decode"), 1.0)
    result = state.handle(prefill_report(1, 0, 10, traceparent="from-prefill"), 1.25)
    (event,) = result.events
    lanes = LaneInputs(0, 0, 0.0, 0.0, None, None)
    plan = plan_of(result)
    assert event == PlanDecided(plan, "from-decode", 1.0, 1.25, "always the decode side", lanes)


def test_a_rank_that_asked_hears_once_what_became_of_a_room_on_both_sides():
    state = cluster("decode")
    state.handle(prefill_report(1, 0, 10), 0.0)
    state.handle(decode_report(1, 0, tell_loaded=True), 0.0)
    assert state.handle(done(1, "p0", reason="no host memory"), 1.0).told == ()
    last = done(1, "d0", lane("store", 0, 10))
    told = Loaded(
        room=1,
        path="decode",
        split_page=10,
        hit_pages=10,
        decode_read_bytes=10 * PAGE_BYTES,
        fallbacks=("no host memory",),
    )
    assert state.handle(last, 1.1).told == ((RankKey("d0", 0), told),)
    assert state.handle(last, 1.2).told == ()


def test_a_router_that_asked_when_it_placed_a_request_hears_what_became_of_it():
    state = cluster("decode")
    rooms = [
        state.handle(Place(request_id=str(asks), prompt_tokens=160, tell_loaded=asks), 0.0).reply.room
        for asks in (True, False)
    ]
    results = []
    for room in rooms:
        state.handle(prefill_report(room, 0, 10), 0.0)
        state.handle(decode_report(room, 0), 0.0)
        state.handle(done(room, "p0", lane("peer", 0, 10)), 1.0)
        results.append(state.handle(done(room, "d0", lane("store", 0, 10)), 1.0))
    size = 10 * PAGE_BYTES
    assert results[0].loaded == Loaded(
        room=rooms[0],
        path="decode",
        split_page=10,
        hit_pages=10,
        decode_read_bytes=size,
        forwarded_bytes=size,
    )
    assert results[1].loaded is None


# Predictions


def test_a_finished_read_says_how_long_it_was_expected_to_take():
    load = Workload(read_rate_bytes_per_s=1e6, read_queue_bytes=5000)
    state = cluster("decode", heartbeat("p0", load=load), heartbeat("d0", load=load))
    state.handle(prefill_report(1, 0, 10), 0.0)
    lanes = state.handle(decode_report(1, 0, traceparent="caller"), 0.0).events[0].lanes
    assert lanes == LaneInputs(5000, 5000, 1e6, 1e6, None, 0.015)
    read = replace(lane("store", 0, 10), queue_s=0.25, busy_s=0.5)
    result = state.handle(done(1, "d0", read), 1.0)
    (ended,) = [event for event in result.events if isinstance(event, ReadEnded)]
    assert ended == ReadEnded(1, Role.DECODE, "d0", "caller", 0.015, 0.75)
    assert ended.error_s == pytest.approx(0.735)
    # The PE was expected to read nothing, so whatever it read says nothing about the prediction.
    result = state.handle(done(1, "p0", lane("store", 0, 10)), 1.0)
    assert not [event for event in result.events if isinstance(event, ReadEnded)]


def test_a_read_that_left_its_plan_is_no_measure_of_the_prediction():
    state = cluster(
        "decode", *(heartbeat(name, load=Workload(read_rate_bytes_per_s=1e6)) for name in ("p0", "d0"))
    )
    state.handle(prefill_report(1, 0, 10), 0.0)
    state.handle(decode_report(1, 0), 0.0)
    result = state.handle(done(1, "d0", lane("store", 0, 4), reason="store failed"), 1.0)
    assert not [event for event in result.events if isinstance(event, ReadEnded)]


def test_the_life_of_a_request_leaves_nothing_for_the_garbage_collector():
    state = cluster("split", *(heartbeat(name) for name in ("p0", "d0")), placement="affinity")

    def one_request(now_s):
        room = state.handle(Place(request_id="r", session_id="s", prompt_tokens=1000), now_s).reply.room
        state.handle(prefill_report(room, 0, 10), now_s)
        state.handle(decode_report(room, 0), now_s)
        state.handle(done(room, "p0", lane("store", 0, 5)), now_s)
        state.handle(done(room, "d0", lane("store", 5, 10)), now_s)
        beat_all(state, now_s)

    for second in range(30):
        one_request(float(second))
    gc.collect()
    gc.disable()
    try:
        for second in range(30, 90):
            one_request(float(second))
        assert gc.collect() == 0
    finally:
        gc.enable()


# Refusals


def test_a_report_of_an_unknown_engine_or_rank_is_refused():
    state = cluster()
    assert refused(state, prefill_report(1, 0, 10, by="p9")).code is ErrorCode.UNKNOWN_ENGINE
    error = refused(state, prefill_report(1, 0, 10, rank=3))
    assert error.code is ErrorCode.UNKNOWN_ENGINE and error.room == 1
    assert "p0 rank 3" in error.message


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize(
    "contradiction",
    [
        prefill_report(1, 0, 10, by="p1"),
        prefill_report(1, 0, 11),
        prefill_report(1, 1, 10),
        prefill_report(1, 0, 11, rank=1),
        replace(prefill_report(1, 0, 10), prompt_tokens=99_999),
        done(1, "p1"),
    ],
)
def test_a_contradiction_is_refused(contradiction, planned):
    ranks = [heartbeat("p0", rank=rank, tp_size=2) for rank in (0, 1)]
    state = cluster("decode", *ranks, heartbeat("p1"), heartbeat("d0"))
    state.handle(prefill_report(1, 0, 10), 0.0)
    if planned:
        state.handle(decode_report(1, 0), 0.0)
    assert refused(state, contradiction).code is ErrorCode.CONFLICT


def test_a_role_that_contradicts_the_heartbeat_is_refused():
    assert refused(cluster(), decode_report(1, 0, by="p0")).code is ErrorCode.CONFLICT


def test_more_pages_than_the_prompt_has_are_refused():
    report = replace(prefill_report(1, 0, 10), prompt_tokens=159)
    assert refused(cluster(), report).code is ErrorCode.MALFORMED


def test_two_engines_under_one_name_are_refused_until_the_first_is_gone():
    state = cluster()
    twin = heartbeat("p0", url="http://twin:30000")
    error = refused(state, twin, 1.0)
    assert error.code is ErrorCode.CONFLICT and "url http://twin:30000" in error.message
    assert refused(state, heartbeat("p0", rank=1), 1.0).code is ErrorCode.CONFLICT
    assert state.handle(twin, ENGINE_EXPIRY_S + 0.1) == Result()


def test_a_second_done_that_differs_is_refused_and_an_equal_one_ignored():
    state = cluster()
    first = done(1, "p0", lane("store", 0, 5))
    state.handle(first, 0.0)
    assert state.handle(first, 0.0) == Result()
    assert refused(state, done(1, "p0", lane("store", 0, 6))).code is ErrorCode.CONFLICT
    assert state.engines.get("p0").totals.store_read_bytes == 5 * PAGE_BYTES


# When nothing may be forwarded


@pytest.mark.parametrize(
    ("prefill", "decode", "reason"),
    [
        ([heartbeat("p0", fingerprint="other")], [heartbeat("d0")], "fingerprint_differs"),
        ([heartbeat("p0")], [heartbeat("d0", tp_size=2)], "tp_size_differs"),
        ([heartbeat("p0")], [heartbeat("d0", page_endpoint=None)], "page_endpoints_missing"),
        (
            [heartbeat("p0", tp_size=2), heartbeat("p0", rank=1, tp_size=2)],
            [heartbeat("d0", tp_size=2)],
            "ranks_missing",
        ),
    ],
)
def test_engines_that_cannot_exchange_pages_get_a_plan_without_any_forward(prefill, decode, reason):
    state = cluster("decode", *prefill, *decode)
    state.handle(prefill_report(1, 2, 10), 0.0)
    result = state.handle(decode_report(1, 6), 0.0)
    plan = plan_of(result)
    assert (plan.path, plan.split_page) == (Path.PREFILL, 0)
    assert str(result.events[0].reason).startswith("prefill path without forward: ")
    assert state.fallbacks == {reason: 1}
    assert planned_bytes(state, "d0") == 0
    assert planned_bytes(state, "p0") == 8 * PAGE_BYTES * len(prefill)


def test_a_plan_that_comes_too_late_asks_nothing_of_an_engine_that_went_on_alone():
    state = cluster("decode")
    state.handle(prefill_report(1, 0, 10), 0.0)
    plan = plan_of(state.handle(decode_report(1, 4), PLAN_DEADLINE_S + 0.01))
    assert (plan.path, plan.split_page) == (Path.PREFILL, 0)
    assert state.fallbacks == {"plan_late": 1}


def test_an_engine_that_is_done_before_the_plan_is_not_planned_for():
    state = cluster("decode")
    state.handle(prefill_report(1, 0, 10), 0.0)
    state.handle(done(1, "p0", lane("store", 0, 10), reason="no_plan"), 0.1)
    plan = plan_of(state.handle(decode_report(1, 0), 0.2))
    assert plan.split_page == 0
    assert planned_bytes(state, "p0") == planned_bytes(state, "d0") == 0
    assert state.fallbacks == {"no_plan": 1, "plan_late": 1}


def test_no_plan_is_made_with_an_engine_that_expired():
    state = cluster("decode")
    state.handle(prefill_report(1, 0, 10), ENGINE_EXPIRY_S)
    state.handle(heartbeat("d0"), ENGINE_EXPIRY_S)
    late_s = ENGINE_EXPIRY_S + 0.1
    state.expire(late_s)
    assert refused(state, decode_report(1, 0), late_s).code is ErrorCode.NO_ENGINE
    state.handle(heartbeat("p0"), late_s)
    assert refused(state, decode_report(1, 0), late_s).code is ErrorCode.NO_ENGINE
    assert not state.paths


# Planned bytes


def test_planned_bytes_steer_the_next_request_before_any_heartbeat():
    state = cluster("shorter_queue")
    splits = []
    for room in range(4):
        state.handle(prefill_report(room, 0, 10), 0.0)
        splits.append(plan_of(state.handle(decode_report(room, 0), 0.0)).split_page)
    assert splits == [0, 10, 10, 0]
    assert planned_bytes(state, "p0") == planned_bytes(state, "d0") == 20 * PAGE_BYTES


def test_planned_bytes_and_the_heartbeats_queue_are_not_added_up():
    state = cluster("shorter_queue")
    state.handle(prefill_report(1, 0, 10), 0.0)
    state.handle(decode_report(1, 0), 0.0)
    assert planned_bytes(state, "p0") == 10 * PAGE_BYTES
    state.handle(heartbeat("p0", load=Workload(read_queue_bytes=10 * PAGE_BYTES)), 0.1)
    state.handle(heartbeat("d0", load=Workload(read_queue_bytes=15 * PAGE_BYTES)), 0.1)
    state.handle(prefill_report(2, 0, 10), 0.2)
    assert plan_of(state.handle(decode_report(2, 0), 0.2)).path is Path.PREFILL


def test_a_done_takes_its_ranks_share_off_the_queue():
    ranks = [heartbeat(name, rank=rank, tp_size=2) for name in ("p0", "d0") for rank in (0, 1)]
    state = cluster("decode", *ranks)
    state.handle(prefill_report(1, 0, 10), 0.0)
    state.handle(decode_report(1, 4), 0.0)
    assert planned_bytes(state, "d0") == 2 * 6 * PAGE_BYTES
    state.handle(done(1, "d0", rank=1), 0.1)
    assert planned_bytes(state, "d0") == 6 * PAGE_BYTES


def test_a_restarted_engine_starts_with_an_empty_queue_and_keeps_its_totals():
    state = cluster("prefill")
    state.handle(done(0, "p0", lane("store", 0, 3)), 0.0)
    state.handle(prefill_report(1, 0, 10), 0.0)
    state.handle(decode_report(1, 0), 0.0)
    again_s = ENGINE_EXPIRY_S + 1
    beat_all(state, again_s)
    assert planned_bytes(state, "p0") == 0
    assert state.engines.get("p0").totals.store_read_bytes == 3 * PAGE_BYTES
    state.handle(done(1, "p0", lane("store", 0, 10)), again_s)
    assert planned_bytes(state, "p0") == 0


# Closing, counting and forgetting


def test_a_room_closes_when_every_rank_that_reported_is_done():
    ranks = [heartbeat(name, rank=rank, tp_size=2) for name in ("p0", "d0") for rank in (0, 1)]
    state = cluster("decode", *ranks)
    for rank in (0, 1):
        state.handle(prefill_report(1, 0, 10, rank=rank), 0.0)
    state.handle(decode_report(1, 0), 0.0)
    for message in (done(1, "p0", rank=0), done(1, "d0", rank=0)):
        state.handle(message, 0.1)
    assert (state.rooms.open_count, state.rooms.closed_count) == (1, 0)
    state.handle(done(1, "p0", rank=1), 0.1)
    assert (state.rooms.open_count, state.rooms.closed_count) == (0, 1)
    assert planned_bytes(state, "d0") == 0, "rank 1 never reported; its share must not stay"


def test_a_closed_room_still_replays_its_plan_for_a_while():
    state = cluster("decode")
    state.handle(prefill_report(1, 0, 10), 0.0)
    plan = plan_of(state.handle(decode_report(1, 0), 0.0))
    state.handle(done(1, "p0"), 0.0)
    state.handle(done(1, "d0"), 0.0)
    assert plan_of(state.handle(decode_report(1, 0), 1.0)) == plan
    beat_all(state, CLOSED_LINGER_S + 0.1)
    assert state.handle(decode_report(1, 0), CLOSED_LINGER_S + 0.1) == Result()
    assert state.rooms.closed_count == 1


def test_bytes_and_pages_are_counted_for_the_engine_that_moved_them():
    state = cluster("decode")
    state.handle(done(1, "p0", lane("peer", 0, 8), lane("store", 8, 10), loaded=10), 0.0)
    state.handle(done(1, "d0", lane("store", 0, 8), loaded=8), 0.0)
    status = state.handle(StatusRequest(), 2.0).reply
    by_name = {entry.engine.engine_id: entry for entry in status.engines}
    assert by_name["p0"].store_read_bytes == 2 * PAGE_BYTES
    assert by_name["p0"].forwarded_bytes == 8 * PAGE_BYTES
    assert by_name["d0"].store_read_bytes == 8 * PAGE_BYTES
    assert (by_name["p0"].loaded_pages, by_name["d0"].loaded_pages) == (10, 8)
    assert by_name["p0"].age_s == 2.0
    assert status.duplicate_store_pages == 0
    assert (status.rooms_open, status.rooms_closed) == (0, 1)


def test_a_room_that_never_ends_is_counted_once_it_is_given_up():
    state = cluster("decode", ttl_s=300.0)
    for room in (1, 2):
        state.handle(prefill_report(room, 0, 10), 0.0)
    for role in (done(1, "p0"), done(1, "d0")):
        state.handle(role, 1.0)
    assert state.handle(StatusRequest(), 2.0).reply.rooms_forgotten == 0
    state.expire(301.0)
    status = state.handle(StatusRequest(), 302.0).reply
    assert (status.rooms_open, status.rooms_closed, status.rooms_forgotten) == (0, 1, 1)


def test_pages_both_sides_read_from_the_store_are_counted_once_each():
    ranks = [heartbeat(name, rank=rank, tp_size=2) for name in ("p0", "d0") for rank in (0, 1)]
    state = cluster("decode", *ranks)
    state.handle(done(1, "p0", lane("store", 0, 6), lane("store", 4, 10), rank=0), 0.0)
    state.handle(done(1, "d0", lane("store", 8, 20), rank=1), 0.0)
    assert state.duplicate_store_pages == 0, "different ranks hold different bytes of a page"
    state.handle(done(1, "d0", lane("store", 3, 9), lane("peer", 0, 3), rank=0), 0.0)
    assert state.duplicate_store_pages == 6
    state.handle(done(1, "p0", lane("store", 7, 10), rank=1), 0.0)
    assert state.duplicate_store_pages == 7, "page 9 is new, page 8 was counted on rank 0"
    state.handle(done(2, "d0", lane("store", 0, 6)), 0.0)
    assert state.duplicate_store_pages == 7, "another room is another request"


def test_a_fallback_is_counted_once_per_room_and_reason():
    state = cluster()
    state.handle(done(1, "p0", reason="peer_failed"), 0.0)
    state.handle(done(1, "d0", reason="peer_failed"), 0.0)
    state.handle(done(2, "p0", reason="peer_failed"), 0.0)
    assert state.fallbacks == {"peer_failed": 2}


def test_the_number_of_fallback_reasons_is_bounded():
    state = cluster()
    for room in range(MAX_FALLBACK_REASONS + 5):
        state.handle(done(room, "p0", reason=f"reason {room}"), 0.0)
    assert len(state.fallbacks) == MAX_FALLBACK_REASONS + 1
    assert state.fallbacks["other"] == 5


def test_an_engine_without_heartbeats_expires_and_is_not_placed():
    state = cluster()
    state.handle(heartbeat("p0"), 4.0)
    error = refused(state, Place(request_id="r", prompt_tokens=1), ENGINE_EXPIRY_S + 0.1)
    assert error.code is ErrorCode.NO_ENGINE and "decode" in error.message and error.request_id == "r"
    assert [entry.engine.engine_id for entry in state.engines.status(6.0)] == ["p0"]


def test_rooms_expire_and_release_what_was_planned_for_them():
    state = cluster("prefill")
    state.handle(prefill_report(1, 0, 10), 0.0)
    state.handle(decode_report(1, 0), 0.0)
    for second in range(int(ROOM_TTL_S) + 2):
        beat_all(state, float(second))
        if second < ROOM_TTL_S:
            assert planned_bytes(state, "p0") == 10 * PAGE_BYTES
    assert state.rooms.open_count == 0 and planned_bytes(state, "p0") == 0


def test_the_oldest_room_makes_way_when_there_are_too_many():
    state = cluster("prefill", max_rooms=2)
    for room in (1, 2, 3):
        state.handle(prefill_report(room, 0, 10), 0.0)
        state.handle(decode_report(room, 0), 0.0)
    assert state.rooms.open_count == 2 and state.rooms.get(1) is None
    assert planned_bytes(state, "p0") == 20 * PAGE_BYTES


# Placement


def test_a_placement_names_live_engines_and_a_room_of_its_own():
    state = cluster("decode", *(heartbeat(name) for name in ("p0", "p1", "d0")))
    placements = [state.handle(Place(request_id=f"r{i}", prompt_tokens=1), 0.0).reply for i in range(4)]
    assert all(isinstance(placement, Placement) for placement in placements)
    assert [placement.prefill.engine_id for placement in placements] == ["p0", "p1", "p0", "p1"]
    assert {placement.decode.role for placement in placements} == {Role.DECODE}
    assert len({placement.room for placement in placements}) == 4


def test_what_any_rank_holds_or_lost_shows_in_its_engines_status():
    loads = [Workload(held=1, pool_checks=3, kept_pages=2), Workload(held=0, pool_checks=2, kept_pages=4)]
    ranks = [heartbeat("p0", rank=rank, tp_size=2, load=load) for rank, load in enumerate(loads)]
    state = cluster("decode", *ranks)
    [engine] = state.handle(StatusRequest(), 0.0).reply.engines
    assert (engine.load.held, engine.load.pool_checks, engine.load.kept_pages) == (1, 2, 6)
