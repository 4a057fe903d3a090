"""A control channel that is refused, misunderstood or at fault: nobody waits for a plan that cannot come."""

from __future__ import annotations

import json
import logging
import os
import signal
import time

import pytest
import zmq
from data_path_world import WAIT_S, eventually
from test_data_path_control import (
    Peer,
    engine,
    known_engines,
    plan,
    plan_between,
    report,
    scheduler,
    scripted_scheduler,
)

from dualpath_sgl.control.channel import ControlChannel
from dualpath_sgl.lanes import peer_protocol
from dualpath_sgl.threads import faults
from scheduler_svc.wire import protocol
from scheduler_svc.wire.keys import generate
from scheduler_svc.wire.protocol import Error, ErrorCode, Heartbeat, Report, Role, Workload


def error(code: ErrorCode, room: int | None = None) -> bytes:
    return protocol.encode(Error(code=code, message="not this way, but that one", room=room))


# Versions


@pytest.mark.case("one_new_protocol_field")
def test_a_field_that_a_newer_peer_adds_is_ignored_in_every_message():
    described = engine("d0", Role.DECODE)
    sent = [
        (protocol.decode_request, Heartbeat(described, Workload(tokens=3), version=2)),
        (protocol.decode_request, protocol.Place(request_id="r", prompt_tokens=3)),
        (protocol.decode_request, report(1, "p0", Role.PREFILL, hit_pages=3)),
        (
            protocol.decode_request,
            protocol.Done(
                room=1, engine_id="p0", role=Role.PREFILL, outcome=protocol.Outcome.OK,
                lanes=(protocol.LaneRecord("store", 0, 1, 1, 0.0, 0.0),),
            ),
        ),
        (protocol.decode_request, protocol.Ping()),
        (protocol.decode_request, protocol.StatusRequest()),
        (protocol.decode_reply, protocol.Accepted(version=2)),
        (protocol.decode_reply, protocol.Placement("r", 1, engine("p0", Role.PREFILL), described)),
        (protocol.decode_reply, plan(1)),
        (protocol.decode_reply, protocol.Pong()),
        (protocol.decode_reply, Error(code=ErrorCode.CONFLICT, message="x", room=3)),
        (peer_protocol.decode_to_server, peer_protocol.Pull(1, 0, 2, "layout-1")),
        (peer_protocol.decode_to_server, peer_protocol.Release(1)),
        (peer_protocol.decode_to_lane, peer_protocol.Waiting(1)),
        (peer_protocol.decode_to_lane, peer_protocol.Ended(1, 2)),
        (peer_protocol.decode_to_lane, peer_protocol.Released(1, True)),
        (peer_protocol.decode_to_lane, peer_protocol.Pages(1, "session", 0, (4096,), (64,))),
    ]  # fmt: skip
    for decode, message in sent:
        assert decode(json.dumps(with_more(json.loads(protocol.encode(message)))).encode()) == message


def test_a_field_that_got_another_name_here_keeps_the_one_that_every_release_knows():
    offer = peer_protocol.Pages(1, "127.0.0.1:1", 0, (4096,), (64,))
    assert json.loads(protocol.encode(offer))["session"] == offer.mooncake_address


def with_more(value):
    """The same with one more field in every object."""
    match value:
        case dict():
            return {name: with_more(inner) for name, inner in value.items()} | {"since_2027": {"x": [1]}}
        case list():
            return [with_more(inner) for inner in value]
    return value


@pytest.mark.case("one_new_protocol_field")
def test_an_engine_takes_the_plan_of_a_newer_scheduler():
    def newer(message) -> list[bytes]:
        frame = protocol.encode(plan(5))
        return [frame[:-1] + b',"deadline_s":2.5}'] if isinstance(message, Report) else []

    with scripted_scheduler(newer) as address, Peer(address, "p0", Role.PREFILL) as peer:
        eventually(lambda: peer.channel.connected, "connected")
        peer.channel.send(report(5, "p0", Role.PREFILL, hit_pages=1))
        assert peer.plans.get(timeout=WAIT_S) == plan(5)


class Silent:
    """A scheduler that takes connections and accepts nobody, until it is told to."""

    def __init__(self, answer: bytes | None = None) -> None:
        self.answer = answer
        self.heard: list = []
        self.socket = zmq.Context.instance().socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.address = f"tcp://127.0.0.1:{self.socket.bind_to_random_port('tcp://127.0.0.1')}"

    def serve(self, until) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while not until():
            assert time.monotonic() < deadline_s, self.heard
            if self.socket.poll(20):
                identity, frame = self.socket.recv_multipart()
                message = protocol.decode_request(frame)
                self.heard.append(message)
                if self.answer is not None and isinstance(message, Heartbeat):
                    self.socket.send_multipart([identity, self.answer])

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_) -> None:
        self.socket.close()

    def reports(self) -> int:
        return sum(isinstance(message, Report) for message in self.heard)


@pytest.mark.parametrize(
    "answer",
    [None, error(ErrorCode.VERSION), error(ErrorCode.MALFORMED), error(ErrorCode.CONFLICT), b"?"],
    ids=["silence", "version", "malformed", "conflict", "unreadable"],
)
def test_an_engine_that_was_not_accepted_waits_for_no_plan_and_asks_again(answer, caplog):
    with caplog.at_level(logging.INFO), Silent(answer) as old, Peer(old.address, "p0", Role.PREFILL) as peer:
        old.serve(lambda: len(old.heard) >= 2)
        assert not peer.channel.connected
        peer.channel.send(report(5, "p0", Role.PREFILL, hit_pages=1))
        old.serve(lambda: peer.no_plans == [5])
        old.serve(lambda: len(old.heard) >= 4)
        assert not peer.channel.connected and not old.reports()
        assert all(message.hello and message.version == 2 for message in old.heard)
        said = [record.message for record in caplog.records if record.levelno == logging.ERROR]
        refused = answer is not None and b"not this way" in answer
        assert len(said) == refused, "once, not every second"
        assert not refused or "not this way, but that one" in said[0]
        # The scheduler is upgraded.
        old.answer = protocol.encode(protocol.Accepted(version=2))
        old.serve(lambda: peer.channel.connected)
        old.heard.clear()
        old.serve(lambda: len(old.heard) >= 2)
        assert not any(message.hello for message in old.heard)


def test_a_scheduler_that_refuses_a_later_heartbeat_is_not_waited_for_either():
    with Silent(protocol.encode(protocol.Accepted(version=2))) as changing:
        with Peer(changing.address, "p0", Role.PREFILL) as peer:
            changing.serve(lambda: peer.channel.connected)
            changing.answer = error(ErrorCode.FORBIDDEN)
            changing.serve(lambda: not peer.channel.connected)
            changing.answer = protocol.encode(protocol.Accepted(version=2))
            changing.serve(lambda: peer.channel.connected)


# Reports


@pytest.mark.parametrize("code", [code for code in ErrorCode if code is not ErrorCode.UNKNOWN_ENGINE])
def test_a_report_that_is_refused_gets_no_plan_at_once(code):
    def refuses(message) -> list[bytes]:
        return [error(code, message.room)] if isinstance(message, Report) else []

    with scripted_scheduler(refuses) as address, Peer(address, "p0", Role.PREFILL) as peer:
        eventually(lambda: peer.channel.connected, "connected")
        peer.channel.send(report(5, "p0", Role.PREFILL, hit_pages=1))
        eventually(lambda: peer.no_plans == [5], "it is told")
        assert peer.channel.connected and not peer.channel._unanswered


def test_a_scheduler_that_keeps_forgetting_an_engine_is_asked_twice():
    def forgets(message) -> list[bytes]:
        return [error(ErrorCode.UNKNOWN_ENGINE, message.room)] if isinstance(message, Report) else []

    with scripted_scheduler(forgets) as address, Peer(address, "p0", Role.PREFILL) as peer:
        eventually(lambda: peer.channel.connected, "connected")
        peer.channel.send(report(5, "p0", Role.PREFILL, hit_pages=1))
        eventually(lambda: peer.no_plans == [5], "it is told")


def test_an_answer_that_cannot_be_read_but_for_its_room_means_no_plan():
    def newer(message) -> list[bytes]:
        if not isinstance(message, Report):
            return []
        return [b'{"type":"plan","room":%d,"path":"teleport"}' % message.room]

    with scripted_scheduler(newer) as address, Peer(address, "p0", Role.PREFILL) as peer:
        eventually(lambda: peer.channel.connected, "connected")
        peer.channel.send(report(5, "p0", Role.PREFILL, hit_pages=1))
        eventually(lambda: peer.no_plans == [5], "it is told")


def test_reports_of_a_connection_that_broke_get_no_plan():
    with scheduler() as (process, address), Peer(address, "p0", Role.PREFILL) as peer:
        eventually(lambda: peer.channel.connected, "connected")
        for room in range(3):
            peer.channel.send(report(room, "p0", Role.PREFILL, hit_pages=1))
        eventually(lambda: len(peer.channel._unanswered) == 3, "sent")
        assert not peer.no_plans, "the other side may report yet"
        process.kill()
        process.wait()
        eventually(lambda: sorted(peer.no_plans) == [0, 1, 2], "they are told")
        peer.channel.send(report(4, "p0", Role.PREFILL, hit_pages=1))
        eventually(lambda: 4 in peer.no_plans, "and so is a later one")


def test_a_scheduler_that_is_stopped_counts_as_away_until_it_goes_on():
    with scheduler() as (process, address), Peer(address, "p0", Role.PREFILL) as peer:
        eventually(lambda: peer.channel.connected, "connected")
        os.kill(process.pid, signal.SIGSTOP)
        try:
            eventually(lambda: not peer.channel.connected, "it is missed, though its sockets are open")
        finally:
            os.kill(process.pid, signal.SIGCONT)
        eventually(lambda: peer.channel.connected, "it is back")


# Faults of ours


def test_a_fault_in_the_channel_costs_one_connection_and_is_counted():
    with scheduler() as (_, address):
        with Peer(address, "p0", Role.PREFILL) as prefill, Peer(address, "d0", Role.DECODE) as decode:
            eventually(lambda: prefill.channel.connected and decode.channel.connected, "connected")
            receive, before = prefill.channel._receive, faults.count()

            def fails_once(socket) -> None:
                prefill.channel._receive = receive
                raise IndexError("on purpose")

            prefill.channel._receive = fails_once
            prefill.channel.send(report(5, "p0", Role.PREFILL, hit_pages=9))
            decode.channel.send(report(5, "d0", Role.DECODE))
            eventually(lambda: faults.count() == before + 1, "it is counted")
            eventually(lambda: prefill.no_plans == [5], "its plan was lost with the connection")
            eventually(lambda: prefill.channel.connected, "and there is a new one")
            assert {one.room for one in plan_between(prefill, decode, room=6)} >= {6}
            assert prefill.channel.is_alive()


def test_a_load_that_cannot_be_told_does_not_cost_the_heartbeat():
    with scheduler() as (_, address), Peer(address, "p0", Role.PREFILL) as peer:
        peer.load = Workload(sequences=4)
        eventually(lambda: peer.channel.connected, "connected")
        eventually(lambda: known_engines(address)["p0"].sequences == 4, "it is told")
        before = faults.count()
        peer.channel._workload = lambda: 1 / 0
        eventually(lambda: faults.count() >= before + 2, "two heartbeats without a load")
        assert peer.channel.connected and known_engines(address)["p0"].sequences == 4


def test_zeromq_tells_of_connections_only_while_somebody_listens(monkeypatch):
    """Else its I/O thread waits for a listener, and the whole process with it."""
    monitor, listened = zmq.Socket.monitor, []

    def noted(self, address, events=zmq.EVENT_ALL):
        if address is None:
            listened.append(self._monitor_socket is not None and not self._monitor_socket.closed)
        return monitor(self, address, events)

    monkeypatch.setattr(zmq.Socket, "monitor", noted)
    with scheduler() as (_, address), Peer(address, "p0", Role.PREFILL) as peer:
        eventually(lambda: peer.channel.connected, "connected")
    assert listened == [True]


def test_a_message_that_cannot_be_sent_costs_only_itself():
    with scheduler() as (_, address):
        with Peer(address, "p0", Role.PREFILL) as prefill, Peer(address, "d0", Role.DECODE) as decode:
            eventually(lambda: prefill.channel.connected and decode.channel.connected, "connected")
            before = faults.count()
            prefill.channel.send(
                Report(
                    room=5,
                    engine_id="p\ud8000",
                    role=Role.PREFILL,
                    prompt_tokens=9,
                    local_pages=0,
                    hit_pages=0,
                )
            )
            eventually(lambda: prefill.no_plans == [5], "nobody waits for it")
            assert {one.room for one in plan_between(prefill, decode, room=6)} == {6}
            assert faults.count() == before + 1


# Keys


@pytest.mark.case("curve_refusal_is_silent")
def test_an_engine_whose_key_is_not_admitted_says_so_and_is_taken_when_it_is(tmp_path, caplog):
    generate(tmp_path, ["p0", "other"])
    listed = tmp_path / "peers/p0.key"
    aside = listed.rename(tmp_path / "p0.key")
    options = ("--curve-server-key-file", tmp_path / "scheduler.key_secret",
               "--authorized-keys-dir", tmp_path / "peers")  # fmt: skip
    files = tmp_path / "peers/p0.key_secret", tmp_path / "scheduler.key"
    with caplog.at_level(logging.INFO), scheduler("tcp://127.0.0.1:0", *options) as (_, address):
        channel = ControlChannel(address, engine("p0", Role.PREFILL), files)
        channel.serve(Workload, print, print)
        try:
            eventually(lambda: errors(caplog), "it says so")
            assert "authorized keys" in errors(caplog)[0] and "prefill path" in errors(caplog)[0]
            assert not channel.connected
            aside.rename(listed)
            eventually(lambda: channel.connected, "its key is there now")
            assert len(errors(caplog)) == 1
        finally:
            channel.stop()


@pytest.mark.case("curve_refusal_is_silent")
@pytest.mark.parametrize("scheduler_has_keys", [True, False])
def test_keys_on_one_side_only_are_a_refusal_and_not_an_absence(tmp_path, caplog, scheduler_has_keys):
    generate(tmp_path, ["p0"])
    options, files = (), (tmp_path / "peers/p0.key_secret", tmp_path / "scheduler.key")
    if scheduler_has_keys:
        options = ("--curve-server-key-file", tmp_path / "scheduler.key_secret",
                   "--authorized-keys-dir", tmp_path / "peers")  # fmt: skip
        files = None
    with caplog.at_level(logging.INFO), scheduler("tcp://127.0.0.1:0", *options) as (_, address):
        channel = ControlChannel(address, engine("p0", Role.PREFILL), files)
        channel.serve(Workload, print, print)
        try:
            eventually(lambda: errors(caplog), "the engine says so")
            assert "refuses this engine" in errors(caplog)[0]
        finally:
            channel.stop()


def test_a_scheduler_that_is_down_is_no_refusal(caplog):
    with caplog.at_level(logging.INFO), Peer("tcp://127.0.0.1:9", "p0", Role.PREFILL) as peer:
        peer.channel.send(report(1, "p0", Role.PREFILL, hit_pages=1))
        eventually(lambda: peer.no_plans == [1], "no plan")
        time.sleep(1.0)
        assert not errors(caplog)


def errors(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.ERROR]
