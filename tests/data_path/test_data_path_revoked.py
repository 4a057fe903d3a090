"""A prefetch that SGLang gives up after its report, because the host pool is full.

Real page server and lane; the engine around them (scheduler channel, SGLang's request) is a few
values, since a full host pool at that very moment cannot be ordered from SGLang.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from data_path_world import FINGERPRINT, PAGE_TOKENS, Rank, bytes_of, eventually, rooms
from engine_parts import EngineParts

from dualpath_sgl.lanes.page_server import PageServer
from dualpath_sgl.lanes.peer_lane import PeerLane
from dualpath_sgl.prefill import PrefillSide
from scheduler_svc.wire.protocol import Done, Outcome, Path, Plan, Report, Role

LONG_S = 60.0
UNTRACED = SimpleNamespace(trace_ctx=SimpleNamespace(tracing_enable=False))
PAGES = 6


@pytest.fixture(scope="module")
def decode() -> Rank:
    return Rank(pages=64)


@pytest.fixture(scope="module")
def server(decode) -> PageServer:
    server = PageServer("127.0.0.1", decode.forwarder.mooncake_address, FINGERPRINT, LONG_S, LONG_S)
    server.start()
    return server


@pytest.fixture
def engine(decode) -> EngineParts:
    """A PE whose messages to the scheduler are kept in `sent`."""

    def new_lane(endpoint: str, _engine_id: str, fingerprint: str) -> PeerLane:
        return PeerLane(endpoint, decode.forwarder, fingerprint, LONG_S, engine.store_lane.take_over)

    engine = EngineParts(Role.PREFILL, page_tokens=PAGE_TOKENS, new_lane=new_lane, fingerprint=FINGERPRINT)
    return engine


def request(room: int, rid: str) -> SimpleNamespace:
    return SimpleNamespace(
        bootstrap_room=room,
        rid=rid,
        origin_input_ids=[0] * 30,
        extra_key=None,
        cache_salt=None,
        time_stats=UNTRACED,
    )


def arrived(engine, side: PrefillSide) -> tuple[str, int]:
    """A request whose PAGES stored pages are reported."""
    room = next(rooms)
    rid = f"request-{room}"
    side.begin(request(room, rid))
    side.matched(rid, 0)
    side.hits_known(SimpleNamespace(request_id=rid, pool_transfers=None), PAGES * PAGE_TOKENS, PAGE_TOKENS)
    assert isinstance(engine.sent[-1], Report) and engine.sent[-1].hit_pages == PAGES
    return rid, room


def plan(room: int, endpoint: str) -> Plan:
    return Plan(
        room=room,
        path=Path.DECODE,
        prefill_id="prefill-0",
        decode_id="decode-0",
        prefill_local_pages=0,
        decode_local_pages=0,
        hit_pages=PAGES,
        split_page=PAGES,
        decode_endpoints=(endpoint,),
        policy="decode",
    )


def test_the_decode_engine_lets_go_when_the_request_ends_without_a_load(engine, server):
    side = engine.side
    rid, room = arrived(engine, side)
    server.offer(room, 0)
    side.on_plan(plan(room, server.endpoint))
    side.forget(rid)
    eventually(lambda: server.offered_rooms == 0, "room closed")
    done = engine.sent[-1]
    assert isinstance(done, Done) and done.outcome is Outcome.FALLBACK
    assert done.fallback_reason == "no host memory" and done.loaded_pages == 0


def test_a_second_look_at_the_store_still_follows_the_plan(engine, server, decode):
    side = engine.side
    rid, room = arrived(engine, side)
    side.on_plan(plan(room, server.endpoint))
    side.matched(rid, 2 * PAGE_TOKENS)  # two pages came into SGLang's tree meanwhile
    source = decode.pages(PAGES)
    server.offer(room, 0)
    server.publish(room, *decode.blocks(source))
    server.end(room)
    load = decode.load(PAGES - 2, first_page=2)
    load.operation.request_id = rid
    side.take_operation(decode.controller, load.operation)
    eventually(lambda: isinstance(engine.sent[-1], Done), "load done")
    assert engine.sent[-1].outcome is Outcome.OK and engine.sent[-1].loaded_pages == PAGES - 2
    landed = bytes_of(decode.pool, load.operation.host_indices)
    assert torch.equal(landed, bytes_of(decode.pool, source)[2:])


def test_a_request_without_a_report_ends_silently(engine):
    side = engine.side
    room = next(rooms)
    side.begin(request(room, "r"))
    side.forget("r")
    assert engine.sent == []
