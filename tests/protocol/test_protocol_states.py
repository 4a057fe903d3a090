"""Every state of the protocols, for 1 PE, 2 DEs, 2 rooms and a relay: no invariant breaks in any of them.

Three worlds share the work, since the product of all would have no end: the room's life (report, plan, abort,
restart), the pull (offer, ready, release, lease) and the ring (fetch, ready, release, revoke, reuse).  In each,
every loss, repetition, delay and crash happens at every moment; the long ones, with two faults, are slow tests.
"""

from __future__ import annotations

from collections.abc import Callable

import pull_world
import pytest
import ring_world
import room_world
from pull_world import PullWorld, Room
from ring_world import RingWorld
from room_world import RoomWorld
from state_search import Broken, Explored, explore

from dualpath_sgl.decode import DecodeSide
from dualpath_sgl.lanes import page_server, peer_lane
from dualpath_sgl.lanes.page_load import PageLoad
from dualpath_sgl.lanes.peer_lane import PeerLane
from dualpath_sgl.lanes.peer_protocol import Released
from dualpath_sgl.relay import server, wire
from dualpath_sgl.relay.client.lane import RelayLane
from dualpath_sgl.relay.fetches import Fetches
from dualpath_sgl.relay.readers import Read
from scheduler_svc.ledger.rooms import Side
from scheduler_svc.wire.protocol import encode

PULL = ("lose", "again", "late", "cut", "crash", "restart", "abort", "cancel", "short", "fail", "hang")
RING = (
    "lose",
    "again",
    "late",
    "cut",
    "crash",
    "missing",
    "fail",
    "hang",
    "drain",
    "early",
    "overdue",
    "urge",
)
ROOM = ("restart", "abort", "leave", "revoke", "decline", "short", "silent")
ONE, BOTH_ON_ONE, APART, SAME_NUMBER = (
    (Room(1, 0),), (Room(1, 0), Room(2, 0)), (Room(1, 0), Room(2, 1)), (Room(1, 0), Room(1, 0)),
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("own_process")


def told(name: str, found: Explored, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{name}: {found.states} states, {found.steps} steps, {found.depth} deep", flush=True)


def named(plots: dict) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("plot", [pytest.param(plot, id=name) for name, plot in plots.items()])


PULLS = {
    "one room, any fault": pull_world.Plot(ONE, PULL, 1),
    "one room of two pages, and time passes": pull_world.Plot(ONE, longs=1, pages=2),
    "two rooms on one DE": pull_world.Plot(BOTH_ON_ONE),
}
RINGS = {
    "any fault": ring_world.Plot(RING, 1),
    "time passes": ring_world.Plot(longs=1),
}
ROOMS = {
    "two rooms, two DEs": room_world.Plot((0, 1), at_once=True),
    "two rooms on one DE that holds a page": room_world.Plot((0, 0), at_once=True, held=1),
    "one room, any fault of an engine": room_world.Plot((0,), ROOM, 1, at_once=True),
    "one room, and time passes": room_world.Plot((0,), longs=1, at_once=True),
    "one room, a message is lost": room_world.Plot((0,), ("lose", "late"), 1),
    "one room, the scheduler restarts": room_world.Plot((0,), ("restart",), 1),
}


@named(PULLS)
def test_no_state_of_a_pull_breaks_an_invariant(plot, monkeypatch, capsys, request):
    pull_world.play(monkeypatch)
    told(request.node.name, explore(lambda: PullWorld(plot)), capsys)


@named(RINGS)
def test_no_state_of_a_relay_and_its_client_breaks_an_invariant(plot, monkeypatch, capsys, request):
    ring_world.play(monkeypatch)
    told(request.node.name, explore(lambda: RingWorld(plot)), capsys)


@named(ROOMS)
def test_no_state_of_a_room_breaks_an_invariant(plot, monkeypatch, capsys, request):
    room_world.play(monkeypatch)
    told(request.node.name, explore(lambda: RoomWorld(plot)), capsys)


@pytest.mark.slow
@named(
    {
        "any two faults": pull_world.Plot(ONE, PULL, 2),
        "any fault, and time passes": pull_world.Plot(ONE, PULL, 1, longs=1),
        "two DEs": pull_world.Plot(APART),
        "a number comes again": pull_world.Plot(SAME_NUMBER),
    }
)
def test_no_state_further_away_of_a_pull_breaks_an_invariant(plot, monkeypatch, capsys, request):
    pull_world.play(monkeypatch)
    told(request.node.name, explore(lambda: PullWorld(plot)), capsys)


@pytest.mark.slow
@named({"any two faults": ring_world.Plot(RING, 2), "room for both": ring_world.Plot(RING, 1, slots=2)})
def test_no_state_further_away_of_a_relay_breaks_an_invariant(plot, monkeypatch, capsys, request):
    ring_world.play(monkeypatch)
    told(request.node.name, explore(lambda: RingWorld(plot)), capsys)


@pytest.mark.slow
@named(
    {
        "two DEs, and an engine or the scheduler drops out": room_world.Plot(
            (0, 1), ("abort", "leave", "restart"), 1, at_once=True
        ),
        "a message comes twice": room_world.Plot((0,), ("again",), 1),
    }
)
def test_no_state_further_away_of_a_room_breaks_an_invariant(plot, monkeypatch, capsys, request):
    room_world.play(monkeypatch)
    told(request.node.name, explore(lambda: RoomWorld(plot)), capsys)


def test_a_client_that_was_forgotten_cannot_use_the_number_of_what_is_under_way(monkeypatch):
    ring_world.play(monkeypatch)
    relay = RingWorld(ring_world.Plot(slots=2)).relay
    hello, fetch = (
        wire.Hello(engine="stranger", rank=0),
        wire.Fetch(lease=1, keys=("a",), sizes=(1,), left_bytes=0),
    )

    def says(*messages: wire.ToRelay) -> list[wire.ToClient]:
        relay.server._door.wire.sent.clear()
        relay.server._door.wire.inbox.extend([b"stranger", encode(message)] for message in messages)
        relay.server._turn()
        return [wire.decode_to_client(data) for _, data in relay.server._door.wire.sent]

    says(hello, fetch)
    relay.server._forget(b"stranger")
    assert says(hello, fetch)[-1] == wire.Refused(1, wire.Reason.IN_USE)
    relay.reads.next = relay.reads.waiting.pop()
    relay.server._readers._run()
    relay.server._turn()
    assert not len(relay.server._fetches) and relay.ring.free_bytes == 2
    assert [type(answer) for answer in says(fetch)] == [wire.Ready]


# -- rules broken on purpose: the search finds each of them ---------------------------------------


def every_release_counts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(page_server, "Released", lambda room, valid: Released(room=room, valid=True))


def nobody_is_silent(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PeerLane, "_give_up_overdue", lambda lane: None)


def late_writes_are_no_matter(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PageLoad, "withhold", lambda load, first, end: lambda: None)
    give_up = PeerLane._give_up

    def to_all(lane: PeerLane, pull: peer_lane._Pull, reason: str) -> None:
        pull.safe_end = pull.end
        give_up(lane, pull, reason)

    patch.setattr(PeerLane, "_give_up", to_all)


@pytest.mark.parametrize(
    ("rule", "faults", "what"),
    [
        (every_release_counts, ("abort",), "landed with other bytes"),
        (nobody_is_silent, ("lose",), "a pull does not end"),
        (late_writes_are_no_matter, ("hang",), "landed with"),
    ],
)
def test_a_broken_rule_of_pulls_is_found(rule: Callable, faults, what, monkeypatch):
    pull_world.play(monkeypatch)
    rule(monkeypatch)
    with pytest.raises(Broken, match=what):
        explore(lambda: PullWorld(pull_world.Plot(ONE, faults, 1)))


def every_lease_holds(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(server, "Released", lambda lease, valid: wire.Released(lease, True))


def a_hanging_read_gives_its_memory_back(patch: pytest.MonkeyPatch) -> None:
    give_up = Fetches.give_up

    def freely(fetches: Fetches, read: Read) -> list:
        lost = give_up(fetches, read)
        fetches.unpin([read.extent])
        read.extent.pins = 1
        return lost

    patch.setattr(Fetches, "give_up", freely)


def unconfirmed_bytes_land(patch: pytest.MonkeyPatch) -> None:
    is_ready = RelayLane._pull

    def at_once(lane: RelayLane) -> None:
        is_ready(lane)
        for number in list(lane._confirming):
            lane._released(wire.Released(number, True))

    patch.setattr(RelayLane, "_pull", at_once)


@pytest.mark.parametrize(
    "rule", [every_lease_holds, a_hanging_read_gives_its_memory_back, unconfirmed_bytes_land]
)
def test_a_broken_rule_of_relays_is_found(rule: Callable, monkeypatch):
    ring_world.play(monkeypatch)
    rule(monkeypatch)
    with pytest.raises(Broken, match="landed for"):
        explore(lambda: RingWorld(ring_world.Plot(longs=1)))


def charges_stay(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Side, "release", lambda side, rank: None)


def offers_outlive_their_pages(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DecodeSide, "give_back", lambda side, rid: None)


@pytest.mark.parametrize(
    ("rule", "faults", "what"),
    [
        (charges_stay, (), "bytes stay planned"),
        (offers_outlive_their_pages, ("revoke",), "still offered"),
    ],
)
def test_a_broken_rule_of_rooms_is_found(rule: Callable, faults, what, monkeypatch):
    room_world.play(monkeypatch)
    rule(monkeypatch)
    with pytest.raises(Broken, match=what):
        explore(lambda: RoomWorld(room_world.Plot((0,), faults, 1)))
