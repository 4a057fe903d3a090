"""Servers with data parallelism: each DP rank is an engine of its own, under its server's one URL."""

from __future__ import annotations

import pytest
from scheduler_vocabulary import (
    cluster,
    decode_report,
    done,
    heartbeat,
    plan_of,
    planned_bytes,
    prefill_report,
    receivers,
)

from scheduler_svc.state import NOTHING
from scheduler_svc.wire.engine_names import check_server_id, engine_name, server_id
from scheduler_svc.wire.protocol import Path, Place, decode_request, encode


def dp_beats(server: str, dp_size: int = 2):
    return [
        heartbeat(engine_name(server, rank), dp_rank=rank, dp_size=dp_size, url=f"http://{server}:1")
        for rank in range(dp_size)
    ]


def two_servers(policy: str = "decode"):
    return cluster(policy, *dp_beats("p0"), *dp_beats("d0"))


def test_a_dp_rank_is_named_after_its_server():
    assert engine_name("decode-0", 1) == "decode-0/dp1"
    assert engine_name("decode-0", None) == "decode-0"
    assert server_id("decode-0/dp1") == server_id("decode-0") == "decode-0"


@pytest.mark.parametrize("name", ["decode-0/dp1", "rack/decode-0"])
def test_an_engine_id_that_could_be_a_part_of_another_is_refused(name):
    with pytest.raises(ValueError, match="choose a name without one"):
        check_server_id(name)


def test_a_heartbeat_carries_its_dp_rank():
    beat = dp_beats("d0")[1]
    assert decode_request(encode(beat)).engine == beat.engine
    assert beat.engine.dp_rank == 1


@pytest.mark.case("dp_ranks_share_engine_id")
@pytest.mark.parametrize("dp_rank", [0, 1])
def test_a_plan_names_the_page_server_of_the_dp_rank_that_has_the_request(dp_rank):
    state, mine = two_servers(), f"d0/dp{dp_rank}"
    state.handle(decode_report(1, 0, by=mine), 1.0)
    result = state.handle(prefill_report(1, 0, 9, by="p0/dp1"), 1.1)
    assert plan_of(result).decode_endpoints == (f"tcp://d0-dp{dp_rank}:1000",)
    assert receivers(result) == [("p0/dp1", 0), (mine, 0)]
    assert planned_bytes(state, mine) > 0
    assert planned_bytes(state, f"d0/dp{1 - dp_rank}") == 0


def test_a_placement_chooses_dp_ranks():
    state = two_servers()
    placements = [state.handle(Place(request_id=str(n), prompt_tokens=10), 1.0).reply for n in range(4)]
    for role in ("prefill", "decode"):
        chosen = [getattr(placement, role) for placement in placements]
        assert {engine.dp_rank for engine in chosen} == {0, 1}
        assert len({engine.url for engine in chosen}) == 1


def test_a_placed_request_that_reaches_other_dp_ranks_is_planned_where_it_is():
    state = two_servers()
    placed = state.handle(Place(request_id="r", prompt_tokens=100_000), 1.0).reply
    there = [
        f"{kind}0/dp{1 - engine.dp_rank}" for kind, engine in (("p", placed.prefill), ("d", placed.decode))
    ]
    assert state.handle(decode_report(placed.room, 0, by=there[1]), 1.1) == NOTHING
    plan = plan_of(state.handle(prefill_report(placed.room, 0, 9, by=there[0]), 1.2))
    assert (plan.prefill_id, plan.decode_id, plan.path) == (*there, Path.DECODE)
    for name in there:
        assert state.handle(done(placed.room, name), 1.3).reply is None
    assert state.rooms.open_count == 0


def test_dp_ranks_of_another_layout_exchange_nothing():
    state = cluster("decode", *dp_beats("p0"), heartbeat("d0/dp0", dp_rank=0, dp_size=2, fingerprint="other"))
    state.handle(decode_report(1, 0, by="d0/dp0"), 1.0)
    assert plan_of(state.handle(prefill_report(1, 0, 9, by="p0/dp0"), 1.1)).split_page == 0
