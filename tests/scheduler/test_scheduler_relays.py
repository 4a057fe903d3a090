"""Relays: who is known, who is told of them, what a room with an engine in relay mode gets."""

from __future__ import annotations

import pytest
from scheduler_vocabulary import (
    cluster,
    decode_report,
    done,
    heartbeat,
    lane,
    plan_of,
    prefill_report,
    receivers,
    relay_beat,
    snapshot,
)
from test_scheduler_server import WAIT_S, cluster_without_engines, running, settled
from test_scheduler_strangers import keys, refused, secured, until  # noqa: F401 - fixtures

from scheduler_svc.helping import PERIOD_S, SETTLE_S, SOON_S
from scheduler_svc.ledger.relays import RELAY_EXPIRY_S, STATUS_RELAYS, RelayTable
from scheduler_svc.policies.help_policy import HIDES, MOST, STALE_S, Reader, Ring, help_for
from scheduler_svc.policies.path_policies import path_policy
from scheduler_svc.policies.placement_policies import placement_policy
from scheduler_svc.state import Cluster
from scheduler_svc.wire.authorized_keys import refusal
from scheduler_svc.wire.protocol import (
    MAX_MESSAGE_BYTES,
    Accepted,
    Error,
    ErrorCode,
    Helpers,
    Mode,
    Path,
    RelayHeartbeat,
    RelayInfo,
    RelayLoad,
    StatusRequest,
    Workload,
    encode,
)

RELAY_MODE = {"mode": Mode.RELAY, "hello": True, "version": 2}


def names(helpers: Helpers) -> list[str]:
    return [relay.name for relay in helpers.relays]


def relay_cluster(*prefills: str):
    """Engines in relay mode, and no relay."""
    return cluster("split", *(heartbeat(name, mode=Mode.RELAY, version=2) for name in (*prefills, "d0")))


def told(state, now_s: float) -> dict[str, list[str]]:
    """Names by engine, for those that are told anything."""
    return {key.engine_id: names(helpers) for key, helpers in state.helpers_due(now_s)}


# Who is known


def test_a_relay_is_known_from_its_heartbeat_until_it_is_silent():
    state = relay_cluster("p0")
    assert state.handle(relay_beat("a", hello=True), 0.0).reply == Accepted(2)
    assert state.handle(relay_beat("a", queue_bytes=7), 1.0).reply is None
    status = state.handle(StatusRequest(relays=True), 1.0).reply
    assert [(one.relay.name, one.load.queue_bytes, one.age_s) for one in status.relays] == [("a", 7, 0.0)]
    state.expire(1.0 + RELAY_EXPIRY_S)
    assert state.expired_relays() == []
    state.expire(1.1 + RELAY_EXPIRY_S)
    assert state.expired_relays() == ["a"] and len(state.relays) == 0


def test_a_relay_of_another_release_is_told_whom_to_upgrade():
    state = relay_cluster("p0")
    before = snapshot(state)
    beat = relay_beat("a")
    answer = state.handle(RelayHeartbeat(relay=beat.relay, version=9, oldest_version=9), 0.0).reply
    assert isinstance(answer, Error) and answer.code is ErrorCode.VERSION
    assert snapshot(state) == before


def test_one_sender_that_invents_relays_keeps_nobody_else_out():
    table = RelayTable(max_relays=4)
    for number in range(4):
        table.heartbeat(relay_beat(f"r{number}").relay, RelayLoad(), number, b"vandal")
    table.heartbeat(relay_beat("honest").relay, RelayLoad(), 5, b"someone")
    assert table.get("honest") and len(table) == 4
    with pytest.raises(ValueError, match="registered already"):
        table.heartbeat(relay_beat("r9").relay, RelayLoad(), 6, b"vandal")


@pytest.mark.parametrize("count", [1, STATUS_RELAYS, 2 * STATUS_RELAYS + 1])
def test_a_status_shows_all_relays_beside_all_engines(count):
    with running() as scheduler, scheduler.connect() as peer:
        peer.send(heartbeat("p0"))
        for number in range(count):
            peer.send(relay_beat(f"r{number}"))
        settled(peer)
        status = peer.status(WAIT_S)
        assert [one.relay.name for one in status.relays] == [f"r{number}" for number in range(count)]
        assert len(status.engines) == 1 and status.relay_count == count and status.next is None


def test_the_longest_page_of_relays_fits_into_a_message():
    state = cluster_without_engines()
    host = ".".join(["h" * 60] * 3)
    for number in range(STATUS_RELAYS):
        info = RelayInfo(name=f"{number:03d}" + "\U0001f4a5" * 250, endpoint=f"tcp://{host}:30000")
        state.handle(RelayHeartbeat(relay=info, version=2), 0.0)
    page = encode(state.handle(StatusRequest(relays=True), 0.0).reply)
    assert 50_000 < len(page) < MAX_MESSAGE_BYTES / 2


# Who is told


def test_an_engine_in_relay_mode_hears_of_relays_that_come_drain_and_go():
    state = relay_cluster("p0")
    assert told(state, 0.0) == {"p0": []}
    state.handle(relay_beat("a"), 1.0)
    state.handle(relay_beat("b"), 1.0)
    assert set(told(state, 1.0)["p0"]) == {"a", "b"}
    assert told(state, 1.0 + SOON_S) == {}, "nothing has changed"
    state.handle(relay_beat("a", draining=True), 2.0)
    assert told(state, 2.0) == {"p0": ["b"]}
    state.handle(relay_beat("a"), 3.0)
    assert set(told(state, 3.0)["p0"]) == {"a", "b"}, "it was restarted"
    state.handle(relay_beat("b", port=4701), 4.0)
    ((_, helpers),) = state.helpers_due(4.0)
    assert {one.endpoint for one in helpers.relays} == {"tcp://a:4700", "tcp://b:4701"}
    for beat in (heartbeat("p0", mode=Mode.RELAY, version=2), relay_beat("a")):
        state.handle(beat, 4.0 + RELAY_EXPIRY_S)
    state.expire(4.1 + RELAY_EXPIRY_S)
    assert told(state, 4.1 + RELAY_EXPIRY_S) == {"p0": ["a"]}


def test_only_prefill_engines_in_relay_mode_are_told_and_all_their_ranks_the_same():
    state = cluster(
        "split",
        heartbeat("p0"),
        *(heartbeat("p1", rank=rank, tp_size=2, mode=Mode.RELAY, version=2) for rank in (0, 1)),
        heartbeat("d0", mode=Mode.RELAY, version=2),
    )
    state.handle(relay_beat("a"), 0.0)
    due = state.helpers_due(0.0)
    assert [tuple(key) for key, _ in due] == [("p1", 0), ("p1", 1)]
    assert due[0][1] == due[1][1]


def test_an_engine_that_connects_again_is_told_again():
    state = relay_cluster("p0", "p1")
    state.handle(relay_beat("a"), 0.0)
    assert told(state, 0.0).keys() == {"p0", "p1"}
    state.handle(heartbeat("p1", **RELAY_MODE), 1.0)
    assert told(state, 1.0) == {"p1": ["a"]}


def test_a_share_that_changes_is_told_without_another_relay():
    state = relay_cluster("p0", "p1")
    state.handle(relay_beat("a"), 0.0)
    assert {key.engine_id: one.relays[0].share for key, one in state.helpers_due(0.0)} == {"p0": 1, "p1": 1}
    for name, queued in (("p0", 3000), ("p1", 1000)):
        load = Workload(read_queue_bytes=queued, read_rate_bytes_per_s=100)
        state.handle(heartbeat(name, load=load, mode=Mode.RELAY, version=2), 0.5)
    shares = {key.engine_id: one.relays[0].share for key, one in state.helpers_due(0.5 + PERIOD_S)}
    assert shares == {"p0": 0.75, "p1": 0.25}


def test_a_scheduler_that_has_just_started_tells_nobody_that_there_is_no_relay():
    state = Cluster(path_policy("split"), placement_policy("round_robin"), started_s=0.0)
    state.handle(heartbeat("p0", **RELAY_MODE), 0.5)
    state.handle(relay_beat("a"), 0.6)
    assert told(state, 1.0) == {}
    state.handle(relay_beat("b"), SETTLE_S - 0.1)
    assert {name: set(found) for name, found in told(state, SETTLE_S).items()} == {"p0": {"a", "b"}}


def test_a_flood_of_hellos_does_not_make_the_scheduler_look_each_time():
    state = relay_cluster(*(f"p{number}" for number in range(5)))
    state.helpers_due(0.0)
    looks = 0
    for number in range(100):
        state.handle(heartbeat("p0", **RELAY_MODE), 0.001 * number)
        looks += bool(state.helpers_due(0.001 * number))
    assert 0 < looks <= 0.1 / SOON_S


# The policy


def reader(name: str, queued: int, rate: float = 100.0, ready: int = 0, compute: float = 0.0) -> Reader:
    return Reader(name, queued, rate, ready, compute)


@pytest.mark.parametrize(
    ("readers", "shares"),
    [
        ([], {}),
        ([reader("a", 0)], {"a": 1.0}),
        ([reader("a", 500)], {"a": 1.0}),
        ([reader("a", 500), reader("b", 0)], {"a": 1.0, "b": 1.0}),
        ([reader("a", 500), reader("b", 500)], {"a": 0.5, "b": 0.5}),
        ([reader("a", 3000), reader("b", 1000)], {"a": 0.75, "b": 0.25}),
        # The slower link needs more help with the same bytes.
        ([reader("a", 600, 50.0), reader("b", 600, 150.0)], {"a": 0.75, "b": 0.25}),
        # A rate that is not known is the mean of the others; with none known bytes count.
        ([reader("a", 600, 0.0), reader("b", 600)], {"a": 0.5, "b": 0.5}),
        ([reader("a", 300, 0.0), reader("b", 100, 0.0)], {"a": 0.75, "b": 0.25}),
        ([reader("a", 10**9), reader("b", 1)], {"a": 1.0, "b": 0.125}),
    ],
)
def test_shares_follow_the_time_that_each_engine_would_need_alone(readers, shares):
    assert {name: help_.share for name, help_ in help_for(readers).items()} == shares


def test_nobody_helps_an_engine_that_computes_for_longer_than_it_reads():
    long = 100 * (5 + STALE_S)  # tokens at 100 a second; 5 s to read

    def help_of(**changes):
        return help_for([Reader(**{**reader("a", 500, 100.0, long, 100.0)._asdict(), **changes})])["a"]

    assert help_of() == HIDES
    assert help_of(ready_tokens=long - 100).share == 1.0, "what it says may be a second old"
    assert help_of(ready_tokens=0).share == 1.0, "a lone request waits for its bytes"
    assert help_of(compute_rate_tokens_per_s=0.0).share == 1.0, "not known"
    assert help_of(read_rate_bytes_per_s=0.0).share == 1.0, "not known"
    assert help_of(read_queue_bytes=0).share == 1.0


def test_who_is_not_helped_takes_no_share_from_others():
    found = help_for([reader("a", 500, 100.0, 10**6, 100.0), reader("b", 500)])
    assert (found["a"], found["b"].share) == (HIDES, 1.0)


def test_an_engine_whose_loads_hide_keeps_its_relays_and_asks_none():
    state = relay_cluster("p0")
    state.handle(relay_beat("a"), 0.0)
    load = Workload(
        read_queue_bytes=100, read_rate_bytes_per_s=100.0, ready_tokens=900, compute_rate_tokens_per_s=100.0
    )
    state.handle(heartbeat("p0", load=load, mode=Mode.RELAY, version=2), 0.0)
    ((_, helpers),) = state.helpers_due(0.0)
    assert [(one.name, one.share) for one in helpers.relays] == [("a", 0.0)]
    assert helpers.reason == HIDES.reason and state.helping.told.hidden == 1


def test_with_many_relays_an_engine_gets_some_and_one_more_relay_changes_few_lists():
    relays = [relay_beat(f"relay-{number}").relay for number in range(100)]
    engines = [f"p{number}" for number in range(200)]
    before, after = Ring(relays[:-1]), Ring(relays)
    lists = {name: before.from_(before.first(name)) for name in engines}
    assert {len({one.name for one in found}) for found in lists.values()} == {MOST}
    used = [one.name for found in lists.values() for one in found]
    assert max(map(used.count, set(used))) < len(engines), "not all engines ask the same ones"
    changed = [name for name in engines if after.from_(after.first(name)) != lists[name]]
    assert 0 < len(changed) < len(engines) / 2


# Rooms


@pytest.mark.parametrize("in_relay_mode", [("p0",), ("d0",), ("p0", "d0")])
@pytest.mark.parametrize("prefill_first", [True, False])
def test_a_room_with_an_engine_in_relay_mode_is_read_by_its_prefill_engine(in_relay_mode, prefill_first):
    beats = [
        heartbeat(name, version=2, mode=Mode.RELAY if name in in_relay_mode else Mode.DECODE_SIDE)
        for name in ("p0", "d0")
    ]
    state = cluster("decode", *beats)
    reports = [prefill_report(1, 2, 10), decode_report(1, 5)]
    for message in reports if prefill_first else reversed(reports):
        # An engine in relay mode waits for no plan: it has said all at once.
        result = state.handle(message, 0.0)
        if message.engine_id in in_relay_mode:
            state.handle(done(1, message.engine_id), 0.0)
    plan = plan_of(result)
    assert (plan.path, plan.split_page) == (Path.PREFILL, 0)
    assert receivers(result) == [("p0", 0), ("d0", 0)]
    assert "mode relay" in str(result.events[0].reason)
    assert state.fallbacks == {}
    for name in {"p0", "d0"} - set(in_relay_mode):
        assert state.rooms.open_count == 1
        state.handle(done(1, name, *([lane("store", 2, 10)] if name == "p0" else [])), 0.0)
    assert (state.rooms.open_count, state.rooms.closed_count) == (0, 1)


def test_the_reason_says_how_many_relays_the_prefill_engine_was_told_of():
    state = relay_cluster("p0")
    state.handle(relay_beat("a"), 0.0)
    state.helpers_due(0.0)
    state.handle(prefill_report(1, 0, 10), 0.0)
    event = state.handle(decode_report(1, 0), 0.0).events[0]
    assert str(event.reason).endswith("p0 is in mode relay; 1 relays")


def test_ranks_of_one_engine_have_one_mode():
    state = cluster("split", heartbeat("p0", tp_size=2), heartbeat("d0"))
    answer = state.handle(heartbeat("p0", rank=1, tp_size=2, mode=Mode.RELAY), 0.0).reply
    assert isinstance(answer, Error) and "mode relay contradicts decode-side" in answer.message


# Over sockets


def test_lists_come_over_the_engines_own_connection():
    with running() as scheduler, scheduler.connect() as prefill, scheduler.connect() as relay:
        prefill.send(heartbeat("p0", **RELAY_MODE))
        assert prefill.receive(WAIT_S) == Accepted(2)
        scheduler.now_s = 0.5
        assert prefill.receive(WAIT_S) == Helpers()
        scheduler.now_s = 1.0
        relay.send(relay_beat("a", hello=True))
        assert relay.receive(WAIT_S) == Accepted(2)
        assert names(prefill.receive(WAIT_S)) == ["a"]
        scheduler.now_s = 2.0
        relay.send(relay_beat("a", draining=True))
        assert names(prefill.receive(WAIT_S)) == []
        assert scheduler.metric("dualpath_scheduler_helpers_told_total") == 3


def test_another_connection_may_not_speak_for_a_live_relay_and_may_for_one_that_is_closed():
    with running() as scheduler, scheduler.connect() as stranger:
        owner = scheduler.connect()
        owner.send(relay_beat("a"))
        settled(owner)
        stranger.send(relay_beat("a", port=6666))
        answer = stranger.receive(WAIT_S)
        assert isinstance(answer, Error) and answer.code is ErrorCode.CONFLICT
        assert "relay a has another live connection" in answer.message
        assert scheduler.state.relays.get("a").info.endpoint == "tcp://a:4700"
        owner.close()

        def accepted() -> bool:
            stranger.send(relay_beat("a", port=4701, hello=True))
            return stranger.receive(WAIT_S) == Accepted(2)

        until(accepted, "the other connection is closed")
        assert scheduler.state.relays.get("a").info.endpoint == "tcp://a:4701"


def test_metrics_count_relays_and_who_is_helped():
    with running() as scheduler, scheduler.connect() as peer:

        def counted() -> bool:
            scheduler.now_s += 1.0
            peer.send(heartbeat("p0", mode=Mode.RELAY, version=2))
            peer.send(relay_beat("a"))
            peer.send(relay_beat("b", draining=True))
            settled(peer)
            return bool(scheduler.metric("dualpath_scheduler_prefill_engines", help="helped"))

        until(counted, "it is counted")
        assert scheduler.metric("dualpath_scheduler_relays", state="serving") == 1
        assert scheduler.metric("dualpath_scheduler_relays", state="draining") == 1


# Keys


@pytest.mark.case("curve_peer_speaks_for_another")
def test_no_other_key_registers_a_relay(secured):  # noqa: F811
    with secured.peer("p0") as other:
        answer = refused(other, relay_beat("d0"))
        assert "name d0 is not this key's" in answer.message
    assert len(secured.state.relays) == 0
    with secured.peer("d0") as owner:
        owner.send(relay_beat("d0", hello=True))
        assert owner.receive(WAIT_S) == Accepted(2)


@pytest.mark.parametrize(("name", "own"), [("relay-a", True), ("relay-b", False), ("relay-a/dp0", False)])
def test_a_relays_key_speaks_for_its_whole_name_only(name, own):
    beat = RelayHeartbeat(relay=RelayInfo(name=name, endpoint="tcp://h:1"))
    assert (refusal(frozenset({"relay-a"}), beat) is None) is own
