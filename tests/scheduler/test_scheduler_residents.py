"""Decode engines that give away by key what they hold: who is told of them."""

from __future__ import annotations

import json

import pytest
from scheduler_vocabulary import cluster, decode_report, heartbeat, prefill_report, relay_beat
from test_scheduler_server import WAIT_S, running, settled
from test_scheduler_strangers import until

from scheduler_svc.helping import SETTLE_S, SOON_S
from scheduler_svc.ledger.engines import ENGINE_EXPIRY_S
from scheduler_svc.policies.help_policy import MOST
from scheduler_svc.policies.path_policies import path_policy
from scheduler_svc.policies.placement_policies import placement_policy
from scheduler_svc.state import Cluster
from scheduler_svc.wire.protocol import (
    MAX_HELPERS,
    MAX_MESSAGE_BYTES,
    Accepted,
    Helper,
    Helpers,
    Malformed,
    Mode,
    Resident,
    Workload,
    decode_reply,
    decode_request,
    encode,
)

KV = "objects-1"
IN_RELAY_MODE = {"mode": Mode.RELAY, "version": 2}


def takes(name: str, objects: str | None = KV, **more):
    """A prefill engine that takes objects by key."""
    return heartbeat(name, objects=objects, **IN_RELAY_MODE, **more)


def gives(name: str, objects: str | None = KV, port: int | None = 4800, rank: int = 0, **more):
    """A decode engine that gives away what it holds; without a port it has no storage now."""
    host = name.replace("/", "-")
    endpoint = f"tcp://{host}:{port + rank}" if port else None
    return heartbeat(name, objects=objects, fetch_endpoint=endpoint, rank=rank, **IN_RELAY_MODE, **more)


def told(state, now_s: float) -> dict[str, list[tuple[str, int]]]:
    """By engine, names and ranks of those that it was told of."""
    return {
        key.engine_id: [(one.name, one.rank) for one in helpers.residents]
        for key, helpers in state.helpers_due(now_s)
    }


# Who is told of whom


def test_a_prefill_engine_hears_of_the_decode_engines_that_have_its_objects():
    state = cluster(
        "split",
        takes("p0"),
        takes("p1", objects="objects-2"),
        takes("p2", objects=None),
        gives("d0"),
        gives("d1", objects="objects-2"),
        gives("d2", port=None),
        heartbeat("d3", **IN_RELAY_MODE),
    )
    assert told(state, 0.0) == {"p0": [("d0", 0)], "p1": [("d1", 0)], "p2": []}
    (((_, helpers), *_)) = cluster("split", takes("p0"), gives("d0")).helpers_due(0.0)
    assert helpers == Helpers(residents=(Resident("d0", "tcp://d0:4800"),))


def test_decode_engines_join_move_leave_and_die():
    state = cluster("split", takes("p0"))
    assert told(state, 0.0) == {"p0": []}
    state.handle(gives("d0"), 1.0)
    assert told(state, 1.0) == {"p0": [("d0", 0)]}
    assert told(state, 1.0 + SOON_S) == {}, "nothing has changed"
    state.handle(gives("d0", port=4900), 2.0)
    ((_, moved),) = state.helpers_due(2.0)
    assert [one.endpoint for one in moved.residents] == ["tcp://d0:4900"]
    state.handle(gives("d0", port=None), 3.0)
    assert told(state, 3.0) == {"p0": []}, "its storage is detached"
    state.handle(gives("d0"), 4.0)
    assert told(state, 4.0) == {"p0": [("d0", 0)]}
    state.handle(takes("p0"), 4.0 + ENGINE_EXPIRY_S)
    state.expire(4.1 + ENGINE_EXPIRY_S)
    assert told(state, 4.1 + ENGINE_EXPIRY_S) == {"p0": []}, "it is silent"


def test_a_prefill_engine_that_gets_its_storage_later_hears_of_them_then():
    state = cluster("split", takes("p0", objects=None), gives("d0"))
    assert told(state, 0.0) == {"p0": []}
    state.handle(takes("p0"), 1.0)
    assert told(state, 1.0) == {"p0": [("d0", 0)]}


def test_ranks_with_heads_of_their_own_hear_of_the_rank_that_has_the_same():
    two = {"tp_size": 2}
    state = cluster(
        "split",
        *(takes("p0", objects=f"heads-{rank}", rank=rank, **two) for rank in (0, 1)),
        *(gives("d0", objects=f"heads-{rank}", rank=rank, **two) for rank in (0, 1)),
    )
    due = {
        key.rank: [(one.name, one.rank) for one in helpers.residents] for key, helpers in state.helpers_due(0)
    }
    assert due == {0: [("d0", 0)], 1: [("d0", 1)]}


def test_where_all_ranks_have_the_same_objects_the_first_one_is_asked_while_it_lives():
    state = cluster("split", takes("p0"), *(gives("d0", rank=rank, tp_size=2) for rank in (1, 0)))
    assert told(state, 0.0) == {"p0": [("d0", 0)]}
    for beat in (takes("p0"), gives("d0", rank=1, tp_size=2)):
        state.handle(beat, ENGINE_EXPIRY_S)
    state.expire(0.1 + ENGINE_EXPIRY_S)
    assert told(state, 0.1 + ENGINE_EXPIRY_S) == {"p0": [("d0", 1)]}


def test_dp_ranks_are_engines_of_their_own():
    dp = {"dp_size": 2}
    state = cluster("split", takes("p0"), *(gives(f"d0/dp{rank}", dp_rank=rank, **dp) for rank in (0, 1)))
    assert sorted(told(state, 0.0)["p0"]) == [("d0/dp0", 0), ("d0/dp1", 0)]


def test_of_many_decode_engines_each_prefill_engine_gets_some():
    state = cluster(
        "split",
        *(takes(f"p{number}") for number in range(4)),
        *(gives(f"d{number}") for number in range(3 * MOST)),
    )
    lists = list(told(state, 0.0).values())
    assert [len(set(one)) for one in lists] == [MOST] * 4
    assert len({tuple(one) for one in lists}) > 1


def test_relays_and_decode_engines_stand_in_one_list_and_shares_are_of_relays():
    state = cluster("split", takes("p0"), gives("d0"))
    state.handle(relay_beat("a"), 0.0)
    busy = Workload(
        read_queue_bytes=100, read_rate_bytes_per_s=100.0, ready_tokens=900, compute_rate_tokens_per_s=100.0
    )
    state.handle(takes("p0", load=busy), 0.0)
    ((_, helpers),) = state.helpers_due(0.0)
    assert helpers.relays == (Helper("a", "tcp://a:4700", 0.0),)
    assert [one.name for one in helpers.residents] == ["d0"]
    state.handle(prefill_report(1, 0, 10), 0.0)
    reason = str(state.handle(decode_report(1, 0), 0.0).events[0].reason)
    assert "1 relays, not asked" in reason and reason.endswith("1 decode engines by key")


def test_a_prefill_engine_that_loads_by_plans_hears_of_relays_only():
    state = cluster(
        "split", heartbeat("p0", helped=True, version=2), heartbeat("p1", version=2), gives("d0"), takes("p2")
    )
    assert {key.engine_id for key, _ in state.helpers_due(0.0)} == {"p0", "p2"}
    assert state.helping.told.alone == 1, "one that loads by plans needs no relay"
    state.handle(relay_beat("a"), 1.0)
    due = {key.engine_id: helpers for key, helpers in state.helpers_due(1.0)}
    assert due.keys() == {"p0", "p2"}
    assert due["p0"] == Helpers((Helper("a", "tcp://a:4700"),))
    assert state.helping.told.helped == 2


def test_what_was_told_is_told_again_to_who_connects_again_also_where_nobody_helps():
    state = cluster("split", heartbeat("p0", helped=True, version=2), heartbeat("p1", helped=True, version=2))
    assert told(state, 0.0) == {"p0": [], "p1": []}
    state.handle(heartbeat("p1", helped=True, hello=True, version=2), 1.0)
    assert told(state, 1.0) == {"p1": []}


def test_a_scheduler_that_has_just_started_takes_no_decode_engine_from_anybody():
    state = Cluster(path_policy("split"), placement_policy("round_robin"), started_s=0.0)
    state.handle(takes("p0", hello=True), 0.5)
    assert told(state, 1.0) == {}
    state.handle(gives("d0"), SETTLE_S - 0.1)
    assert told(state, SETTLE_S) == {"p0": [("d0", 0)]}


# What is counted


def test_a_metric_counts_those_that_are_told_of():
    with running() as scheduler, scheduler.connect() as peer:

        def counted() -> bool:
            scheduler.now_s += 1.0
            for beat in (takes("p0"), gives("d0"), gives("d1", port=None)):
                peer.send(beat)
            settled(peer)
            return bool(scheduler.metric("dualpath_scheduler_residents"))

        until(counted, "it is counted")
        assert scheduler.metric("dualpath_scheduler_residents") == 1


# Messages


def test_lists_come_over_the_engines_own_connection():
    with running() as scheduler, scheduler.connect() as prefill, scheduler.connect() as decode:
        prefill.send(takes("p0", hello=True))
        assert prefill.receive(WAIT_S) == Accepted(2)
        scheduler.now_s = 0.5
        assert prefill.receive(WAIT_S) == Helpers()
        scheduler.now_s = 1.0
        decode.send(gives("d0", hello=True))
        assert decode.receive(WAIT_S) == Accepted(2)
        assert prefill.receive(WAIT_S) == Helpers(residents=(Resident("d0", "tcp://d0:4800"),))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"fetch_endpoint": "ipc:///tmp/x"}, "endpoint 'ipc:///tmp/x' is not tcp"),
        ({"fetch_endpoint": "tcp://" + "h" * 200 + ":1"}, "fetch_endpoint"),
        ({"objects": ""}, "objects"),
        ({"objects": "x" * 65}, "objects"),
        ({"objects": "a\u202eb"}, "control characters"),
        ({"helped": 1}, "helped"),
    ],
)
def test_what_a_rank_says_of_its_objects_is_checked(change, problem):
    beat = json.loads(encode(heartbeat("d0")))
    beat["engine"] |= change
    with pytest.raises(Malformed, match=problem):
        decode_request(json.dumps(beat).encode())


def test_the_longest_list_fits_into_a_message_and_a_longer_one_is_none():
    host = ".".join(["h" * 60] * 3)
    name = "\U0001f4a5" * 253
    relays = [Helper(f"{number:03d}{name}", f"tcp://{host}:30000", 0.125) for number in range(MAX_HELPERS)]
    holding = [Resident(f"{number:03d}{name}", f"tcp://{host}:30000", 1023) for number in range(MAX_HELPERS)]
    longest = Helpers(tuple(relays), "x" * 256, tuple(holding))
    frame = encode(longest)
    assert decode_reply(frame) == longest and len(frame) < MAX_MESSAGE_BYTES
    with pytest.raises(Malformed, match="residents"):
        decode_reply(encode(Helpers(residents=(*holding, Resident("one-more", "tcp://h:1")))))


def test_engines_and_schedulers_of_before_read_what_is_said_now():
    """They ignore what they do not know; a list without decode engines looks as it did."""
    assert encode(Helpers((Helper("a", "tcp://a:1"),))) == (
        b'{"type":"helpers","relays":[{"name":"a","endpoint":"tcp://a:1"}]}'
    )
    assert b"objects" not in encode(heartbeat("d0")) and b"helped" not in encode(heartbeat("p0"))
