"""The control channel against a real scheduler process that comes and goes."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Queue

import zmq
from data_path_world import WAIT_S, eventually

from dualpath_sgl.control import link
from dualpath_sgl.control.channel import ControlChannel
from scheduler_svc.wire import protocol
from scheduler_svc.wire.client import SchedulerClient
from scheduler_svc.wire.protocol import (
    Accepted,
    Done,
    Error,
    ErrorCode,
    Heartbeat,
    Outcome,
    Path,
    Plan,
    RankInfo,
    Report,
    Role,
    Status,
    StatusRequest,
    Workload,
)


def engine(engine_id: str, role: Role) -> RankInfo:
    return RankInfo(
        engine_id=engine_id,
        role=role,
        url=f"http://{engine_id}:30000",
        page_endpoint="tcp://127.0.0.1:1" if role is Role.DECODE else None,
        fingerprint="layout-1",
        page_size=16,
        page_bytes=1000,
    )


def report(room: int, engine_id: str, role: Role, hit_pages: int | None = None) -> Report:
    return Report(
        room=room, engine_id=engine_id, role=role, prompt_tokens=10_000, local_pages=0, hit_pages=hit_pages
    )


def done(room: int) -> Done:
    return Done(room=room, engine_id="p0", role=Role.PREFILL, outcome=Outcome.OK)


class Peer:
    """A control channel and the plans it got."""

    def __init__(self, address: str, engine_id: str, role: Role) -> None:
        self.plans: Queue[Plan] = Queue()
        self.no_plans: list[int] = []
        """Rooms."""
        self.load = Workload(sequences=3)
        self.channel = ControlChannel(address, engine(engine_id, role))

    def on_plan(self, plan: Plan) -> None:
        self.plans.put(plan)

    def __enter__(self) -> Peer:
        self.channel.serve(lambda: self.load, lambda plan: self.on_plan(plan), self.no_plans.append)
        return self

    def __exit__(self, *_) -> None:
        self.channel.stop()
        assert not self.channel.is_alive()


@contextmanager
def scheduler(bind: str = "tcp://127.0.0.1:0", *options) -> Iterator[tuple[subprocess.Popen, str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "scheduler_svc", "--policy", "decode", "--bind", bind, *options],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        ready = process.stdout.readline()
        assert ready.startswith("scheduler ready at tcp://127.0.0.1:"), ready
        yield process, ready.split()[-1]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def known_engines(address: str) -> dict[str, Workload]:
    with SchedulerClient(address) as client:
        client.send(StatusRequest())
        status = client.receive(WAIT_S)
    assert isinstance(status, Status)
    return {entry.engine.engine_id: entry.load for entry in status.engines}


def plan_between(prefill: Peer, decode: Peer, room: int) -> list[Plan]:
    decode.channel.send(report(room, "d0", Role.DECODE))
    prefill.channel.send(report(room, "p0", Role.PREFILL, hit_pages=9))
    return [peer.plans.get(timeout=WAIT_S) for peer in (prefill, decode)]


def test_engines_register_get_plans_and_find_a_restarted_scheduler_again():
    with scheduler() as (process, address):
        with Peer(address, "p0", Role.PREFILL) as prefill, Peer(address, "d0", Role.DECODE) as decode:
            eventually(lambda: known_engines(address).keys() == {"p0", "d0"}, "both are known")
            assert known_engines(address)["p0"].sequences == 3
            assert prefill.channel.connected and decode.channel.connected
            prefill.load = Workload(sequences=8)
            eventually(lambda: known_engines(address)["p0"].sequences == 8, "a heartbeat brings the load")

            plans = plan_between(prefill, decode, room=1)
            assert plans[0] == plans[1]
            assert (plans[0].room, plans[0].path, plans[0].split_page) == (1, Path.DECODE, 9)

            process.kill()
            process.wait()
            eventually(lambda: not prefill.channel.connected and not decode.channel.connected, "it is missed")
            # What is said to nobody is dropped: it must not come up again as an old question.
            prefill.channel.send(report(2, "p0", Role.PREFILL, hit_pages=9))
            decode.channel.send(report(2, "d0", Role.DECODE))

            with scheduler(bind=address) as (_, same):
                assert same == address
                eventually(lambda: prefill.channel.connected and decode.channel.connected, "it is back")
                eventually(lambda: known_engines(address).keys() == {"p0", "d0"}, "both are known again")
                assert {plan.room for plan in plan_between(prefill, decode, room=3)} == {3}
                assert prefill.plans.empty() and decode.plans.empty()


def test_a_request_that_leaves_brings_a_heartbeat_long_before_the_next_one_is_due(monkeypatch):
    monkeypatch.setattr(link, "HEARTBEAT_S", 1000.0)
    with scheduler() as (_, address), Peer(address, "p0", Role.PREFILL) as peer:
        eventually(lambda: peer.channel.connected, "it is known")
        for sequences in (2, 1, 0):
            peer.load = Workload(sequences=sequences)
            peer.channel.left()
            eventually(lambda: known_engines(address)["p0"].sequences == sequences, "it is told")  # noqa: B023
        monkeypatch.undo()
        peer.channel.left()  # out of its long sleep


def test_a_channel_whose_scheduler_never_came_is_not_connected_and_stops():
    with Peer("tcp://127.0.0.1:9", "p0", Role.PREFILL) as peer:
        for room in range(5000):  # more than a socket's queue holds
            peer.channel.send(report(room, "p0", Role.PREFILL, hit_pages=1))
        eventually(lambda: len(peer.no_plans) == 5000, "nothing of it blocked")
        assert not peer.channel.connected


ACCEPTED = protocol.encode(Accepted(version=protocol.PROTOCOL_VERSION))


@contextmanager
def scripted_scheduler(answers: Callable[[object], list[bytes]]) -> Iterator[str]:
    """Stands in for answers that a healthy scheduler gives only by accident of timing."""
    socket = zmq.Context.instance().socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, 0)
    address = f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}"
    stopping = threading.Event()

    def serve() -> None:
        while not stopping.is_set():
            if socket.poll(20):
                identity, frame = socket.recv_multipart()
                message = protocol.decode_request(frame)
                accepts = isinstance(message, Heartbeat) and message.hello
                for answer in [ACCEPTED] * accepts + answers(message):
                    socket.send_multipart([identity, answer])

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield address
    finally:
        stopping.set()
        thread.join()
        socket.close()


def plan(room: int) -> Plan:
    return Plan(
        room=room, path=Path.PREFILL, prefill_id="p0", decode_id="d0", prefill_local_pages=0,
        decode_local_pages=0, hit_pages=1, split_page=0, policy="prefill",
    )  # fmt: skip


def unknown(room: int) -> bytes:
    return protocol.encode(Error(code=ErrorCode.UNKNOWN_ENGINE, message="heartbeat first", room=room))


def test_a_scheduler_that_forgot_the_engine_gets_heartbeat_and_report_once_more():
    """As after an engine was stopped longer than its heartbeat lasts."""
    heard: list = []

    def forgetful(message) -> list[bytes]:
        heard.append(message)
        if not isinstance(message, Report):
            return []
        said = sum(isinstance(earlier, Report) for earlier in heard)
        return [unknown(message.room)] if said == 1 else [protocol.encode(plan(message.room))]

    with scripted_scheduler(forgetful) as address, Peer(address, "p0", Role.PREFILL) as peer:
        eventually(lambda: peer.channel.connected, "connected")
        sent = report(5, "p0", Role.PREFILL, hit_pages=1)
        peer.channel.send(sent)
        assert peer.plans.get(timeout=WAIT_S) == plan(5)
        assert [message for message in heard if isinstance(message, Report)] == [sent, sent]
        first = heard.index(sent)
        assert isinstance(heard[first + 1], Heartbeat)
        assert peer.channel._unanswered == {}


def test_a_report_is_repeated_only_once_and_never_after_its_done():
    heard: list = []

    def hostile(message) -> list[bytes]:
        heard.append(message)
        return [] if isinstance(message, Heartbeat) else [unknown(message.room)]

    with scripted_scheduler(hostile) as address, Peer(address, "p0", Role.PREFILL) as peer:
        eventually(lambda: peer.channel.connected, "connected")
        peer.channel.send(report(5, "p0", Role.PREFILL, hit_pages=1))
        eventually(lambda: sum(isinstance(message, Report) for message in heard) == 2, "repeated")
        peer.channel.send(done(6))  # answered with an error too: a marker behind all the rest
        eventually(lambda: any(isinstance(message, Done) for message in heard), "the marker")
        assert sum(isinstance(message, Report) for message in heard) == 2
        assert peer.channel.is_alive() and peer.channel._unanswered == {}


def test_unreadable_answers_are_skipped():
    def noisy(message) -> list[bytes]:
        if not isinstance(message, Report):
            return []
        return [b"", b"\xff\xfe", b"{}", b'{"type": "plan", "room": 1}', protocol.encode(plan(message.room))]

    with scripted_scheduler(noisy) as address, Peer(address, "p0", Role.PREFILL) as peer:
        eventually(lambda: peer.channel.connected, "connected")
        peer.channel.send(report(5, "p0", Role.PREFILL, hit_pages=1))
        assert peer.plans.get(timeout=WAIT_S) == plan(5)


def test_one_plan_that_cannot_be_handled_does_not_cost_the_channel():
    def obliging(message) -> list[bytes]:
        return [protocol.encode(plan(message.room))] if isinstance(message, Report) else []

    with scripted_scheduler(obliging) as address, Peer(address, "p0", Role.PREFILL) as peer:
        eventually(lambda: peer.channel.connected, "connected")
        handle = peer.on_plan

        def fail_first(received: Plan) -> None:
            if received.room == 1:
                raise IndexError("a plan for more ranks than there are")
            handle(received)

        peer.on_plan = fail_first
        peer.channel.send(report(1, "p0", Role.PREFILL, hit_pages=1))
        peer.channel.send(report(2, "p0", Role.PREFILL, hit_pages=1))
        eventually(lambda: not peer.plans.empty() or not peer.channel.is_alive(), "the next plan")
        assert peer.channel.is_alive(), "one bad plan must not end the channel"
        assert peer.plans.get(timeout=WAIT_S) == plan(2)
