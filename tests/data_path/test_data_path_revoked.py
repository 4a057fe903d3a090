"""A prefetch that SGLang gives up after its report: the DE must not hold pages nobody will pull.

Real page server and lane; the engine around them (scheduler channel, SGLang's request) is a few
values, since a full host pool at that very moment cannot be ordered from SGLang.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from data_path_world import FINGERPRINT, Rank, eventually, rooms

from dualpath_sgl.config import Settings
from dualpath_sgl.page_server import PageServer
from dualpath_sgl.prefill import PrefillSide
from scheduler_svc.protocol import Done, Outcome, Path, Plan, Report, Role

LONG_S = 60.0
UNTRACED = SimpleNamespace(trace_ctx=SimpleNamespace(tracing_enable=False))
PAGES = 6


@pytest.fixture(scope="module")
def decode() -> Rank:
    return Rank(pages=64)


@pytest.fixture(scope="module")
def server(decode) -> PageServer:
    server = PageServer("127.0.0.1", decode.forwarder.session, FINGERPRINT, LONG_S, LONG_S)
    server.start()
    return server


@pytest.fixture
def engine(decode):
    """A PE whose messages to the scheduler are kept in `sent`."""
    sent: list[Report | Done] = []
    return SimpleNamespace(
        sent=sent,
        settings=Settings(engine_id="prefill-0"),
        rank=0,
        role=Role.PREFILL,
        page_size=4,
        fingerprint=FINGERPRINT,
        forwarder=decode.forwarder,
        controller=SimpleNamespace(prefetch_threshold=4),
        control=SimpleNamespace(send=sent.append, connected=True),
        tracer=None,
    )


def arrived(engine, side: PrefillSide) -> tuple[str, int]:
    """A request whose PAGES stored pages are reported."""
    room = next(rooms)
    rid = f"request-{room}"
    req = SimpleNamespace(bootstrap_room=room, rid=rid, origin_input_ids=[0] * 30, time_stats=UNTRACED)
    side.begin(req)
    side.matched(rid, 0)
    side.hits_known(SimpleNamespace(request_id=rid), PAGES * engine.page_size)
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
        reason="test",
    )


@pytest.mark.parametrize("plan_first", [True, False])
def test_the_decode_engine_lets_go_at_once(engine, server, plan_first):
    side = PrefillSide(engine)
    rid, room = arrived(engine, side)
    server.open(room, 0)
    steps = [lambda: side.on_plan(plan(room, server.endpoint)), lambda: side.revoked(rid)]
    for step in steps if plan_first else reversed(steps):
        step()
    eventually(lambda: server.open_rooms == 0, "room closed")
    done = engine.sent[-1]
    assert isinstance(done, Done) and done.outcome is Outcome.FALLBACK
    assert done.fallback_reason == "no host memory" and done.loaded_pages == 0


def test_giving_up_before_the_report_changes_nothing(engine):
    side = PrefillSide(engine)
    room = next(rooms)
    side.begin(SimpleNamespace(bootstrap_room=room, rid="r", origin_input_ids=[0] * 30, time_stats=UNTRACED))
    side.revoked("r")
    assert engine.sent == []
    side.not_registered("r", 8)
    assert [type(message) for message in engine.sent] == [Report, Done]


def test_giving_up_twice_is_reported_once(engine, server):
    side = PrefillSide(engine)
    rid, room = arrived(engine, side)
    side.revoked(rid)
    side.revoked(rid)
    assert [type(message) for message in engine.sent] == [Report, Done]
