"""What no peer and no fault can do to a running scheduler: end it, fill it, or speak for another engine."""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from scheduler_vocabulary import (
    PAGE_BYTES,
    cluster,
    decode_report,
    done,
    engine,
    heartbeat,
    lane,
    plan_of,
    prefill_report,
    snapshot,
)
from test_scheduler_server import WAIT_S, cluster_without_engines, pair, running, settled

from scheduler_svc.ledger.engines import ENGINE_EXPIRY_S, STATUS_ENGINES, EngineTable
from scheduler_svc.ledger.rooms import MAX_RECORDS, RoomTable
from scheduler_svc.metrics import Metrics
from scheduler_svc.policies.path_policies import path_policy
from scheduler_svc.policies.placement_policies import placement_policy
from scheduler_svc.state import MAX_FALLBACK_REASONS, Cluster
from scheduler_svc.telemetry.log_limit import MOST_LINES, PERIOD_S, LimitedLog
from scheduler_svc.wire import protocol
from scheduler_svc.wire.client import SchedulerClient, SchedulerError
from scheduler_svc.wire.protocol import (
    MAX_COUNT,
    MAX_LANES,
    MAX_MESSAGE_BYTES,
    Error,
    ErrorCode,
    Heartbeat,
    Place,
    Plan,
    Role,
    Workload,
    decode_reply,
    encode,
)

WRONG_URLS = (
    "http://[", "http://", "h:1", "file:///etc/passwd", "ftp://h:1", "http://h:0", "http://h:65536",
    "http://h:1/", "http://h:1/secret", "http://h:1?x=/generate", "http://h:1#x", "http://user@h:1",
    "http://user:key@h:1", "http://h :1", "http://h:1 ", "http://h:1\r\nX: y", "http://h:1\n",
    "http://127.1:1",
    "http://0x7f000001:1", "http://2130706433:1", "http://[::1", "http://::1:1", "http://[fe80::1%eth0]:1",
    "http://h\u00e9:1", "http://a..b:1", "HTTP://h:1", "not a url",
)  # fmt: skip
WRONG_ENDPOINTS = (
    "tcp://", "tcp://h", "tcp://*:5555", "tcp://h:0", "tcp://h:99999", "tcp://[::1:5", "ipc:///tmp/x",
    "inproc://x", "tcp://a;b:1", "tcp://h:1/x", "tcp://h:1\n", "tcp://" + "h" * 300 + ":1",
)  # fmt: skip


def frame_of(message, **changes) -> bytes:
    """The message with other values, however wrong; `engine.url` and the like with a dot."""
    fields = json.loads(encode(message))
    for path, value in changes.items():
        inner = fields
        *outer, last = path.split(".")
        for name in outer:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return json.dumps(fields).encode()


def wrong_messages() -> list[tuple[str, bytes]]:
    """Field and frame, for every kind of field."""
    beat, report, ended = heartbeat("d9"), prefill_report(1, 0, 10), done(1, "d9", lane("store", 0, 4))
    place = Place(request_id="r", prompt_tokens=1)
    wrong = [("engine", frame_of(beat, **{"engine.url": url})) for url in WRONG_URLS]
    wrong += [("engine", frame_of(beat, **{"engine.page_endpoint": end})) for end in WRONG_ENDPOINTS]
    for text in ("a\nb", "a\rb", "a\x1b[31mb", "a\x00b", "a\x9bb", "a\u2028b", "a\u202eb", "", "x" * 257):
        wrong.append(("engine.engine_id", frame_of(beat, **{"engine.engine_id": text})))
        wrong.append(("engine.fingerprint", frame_of(beat, **{"engine.fingerprint": text})))
        wrong.append(("engine_id", frame_of(report, engine_id=text)))
        wrong.append(("request_id", frame_of(place, request_id=text)))
        wrong.append(("session_id", frame_of(place, session_id=text)))
        if text:
            wrong.append(("fallback_reason", frame_of(ended, fallback_reason=text)))
    for rate in (-1, 1.7e308, 1e16):
        wrong.append(("load.read_rate_bytes_per_s", frame_of(beat, **{"load.read_rate_bytes_per_s": rate})))
    for name in ("rank", "tp_size", "page_size", "page_bytes", "bootstrap_port"):
        wrong += [(f"engine.{name}", frame_of(beat, **{f"engine.{name}": value})) for value in (-1, 2**60)]
    for name in ("tokens", "held", "faults", "unplanned_read_bytes"):
        wrong.append((f"load.{name}", frame_of(beat, **{f"load.{name}": MAX_COUNT + 1})))
    for parent in ("x", "00-" + "g" * 32 + "-" + "1" * 16 + "-00", "00-\n", "0" * 129):
        wrong += [("traceparent", frame_of(message, traceparent=parent)) for message in (report, place)]
    for digest in ("", "a\n", "a" * 65):
        wrong.append(("prompt_hash", frame_of(report, prompt_hash=digest)))
    wrong.append(("lanes", frame_of(ended, lanes=json.loads(encode(ended))["lanes"] * (MAX_LANES + 1))))
    one = json.loads(encode(ended))["lanes"][0]
    for name, value in (("busy_s", 1e10), ("queue_s", -1), ("bytes", 2**60), ("lane", "x\ny")):
        wrong.append((f"lanes[0].{name}", frame_of(ended, lanes=[one | {name: value}])))
    wrong += [("version", frame_of(beat, version=value)) for value in (0, 2**31, "2")]
    wrong.append(("after", frame_of(protocol.StatusRequest(), after=-1)))
    return wrong


# Fields


@pytest.mark.case("scheduler_bad_url_heartbeat")
def test_a_message_with_any_wrong_field_is_refused_by_its_name_and_changes_nothing():
    with running() as scheduler, scheduler.connect() as stranger:
        pair(scheduler)
        before = snapshot(scheduler.state)
        for field, frame in wrong_messages():
            stranger.send_frames(frame)
            reply = stranger.receive(WAIT_S)
            assert isinstance(reply, Error) and reply.code is ErrorCode.MALFORMED, frame
            assert reply.message.startswith(field), (field, reply.message)
            assert snapshot(scheduler.state) == before
        # Nothing of it was kept: expiry finds only what is whole.
        scheduler.now_s = ENGINE_EXPIRY_S + 1
        while scheduler.state.engines.get("p0") is not None:
            time.sleep(0.01)
        settled(stranger)
        assert scheduler.state.engines.get("d9") is None
        assert scheduler.metric("dualpath_scheduler_faults_total", step="expiry") == 0


def test_what_is_refused_names_the_room_or_the_request_where_they_can_be_read():
    with running() as scheduler, scheduler.connect() as stranger:
        stranger.send_frames(frame_of(prefill_report(77, 0, 10), engine_id="a\nb"))
        assert stranger.receive(WAIT_S).room == 77
        stranger.send_frames(frame_of(Place(request_id="r7", prompt_tokens=1), session_id="a\nb"))
        assert stranger.receive(WAIT_S).request_id == "r7"
        stranger.send_frames(b'{"type":"no such thing","room":5,"request_id":"x\\ny"}')
        reply = stranger.receive(WAIT_S)
        assert (reply.code, reply.room, reply.request_id) == (ErrorCode.MALFORMED, 5, None)
        assert "\n" not in reply.message


def test_addresses_of_ipv6_and_of_names_are_taken():
    with running() as scheduler, scheduler.connect() as peer:
        for number, host in enumerate(("[::1]", "[2001:db8::1]", "10.0.0.1", "prefill_0.cell-1.example")):
            peer.send(heartbeat(f"d{number}", url=f"http://{host}:30000", page_endpoint=f"tcp://{host}:5"))
        settled(peer)
        assert len(peer.status(WAIT_S).engines) == 4


# Faults of ours


class Faulty:
    """A placement policy that raises where it is told to: stands for any fault in one."""

    name = "faulty"

    def __init__(self) -> None:
        self.raises: set[str] = set()
        self._real = placement_policy("affinity")

    def __getattr__(self, name: str):
        def call(*arguments):
            if name in self.raises:
                raise RuntimeError(f"{name} fails on purpose")
            return getattr(self._real, name)(*arguments)

        return call


def test_a_placement_that_cannot_take_an_engine_costs_that_engine_until_its_next_heartbeat():
    faulty = Faulty()
    state = Cluster(path_policy("decode"), faulty, started_s=0)
    with running(state) as scheduler:
        peers = pair(scheduler)
        faulty.raises = {"joined"}
        peers[1].send(heartbeat("d1"))
        settled(peers[1])
        assert state.engines.get("d1") is not None, "it is known, gets plans, and is only not placed upon"
        assert scheduler.metric("dualpath_scheduler_faults_total", step="placement") == 1
        faulty.raises = set()
        placed = peers[0].place(Place(request_id="r", prompt_tokens=1), WAIT_S)
        assert placed.decode.engine_id == "d0"
        peers[1].send(heartbeat("d1"))
        placed = [peers[1].place(Place(request_id="r", prompt_tokens=1000), WAIT_S) for _ in range(2)]
        assert {placement.decode.engine_id for placement in placed} == {"d0", "d1"}


@pytest.mark.parametrize("step", ["left", "lowered", "joined"])
def test_a_placement_that_fails_when_engines_come_change_or_go_does_not_end_the_scheduler(step):
    faulty = Faulty()
    with running(Cluster(path_policy("decode"), faulty, started_s=0)) as scheduler:
        faulty.raises = {step}
        prefill, decode = pair(scheduler)
        for peer, name in ((prefill, "p0"), (decode, "d0")):
            peer.send(heartbeat(name, load=Workload(tokens=5)))
            settled(peer)
        scheduler.now_s = ENGINE_EXPIRY_S + 1
        while scheduler.state.engines.get("d0") is not None:
            time.sleep(0.01)
        faulty.raises = set()
        pair(scheduler)
        assert prefill.place(Place(request_id="r", prompt_tokens=1), WAIT_S).decode.engine_id == "d0"


def test_a_fault_in_any_step_of_the_loop_is_counted_and_the_next_message_is_served(monkeypatch):
    def broken(*_):
        raise RuntimeError("fails on purpose")

    with running(observers=[broken]) as scheduler:
        _prefill, decode = pair(scheduler)
        server = scheduler._server
        for where, name in (
            (server, "_expire"),
            (server, "_take_one"),
            (server, "_send"),
            (server, "_tick"),
            (server, "_observe"),
            (server._connections, "tick"),
            (scheduler.state.rooms, "expire"),
            (scheduler.state.engines, "expire"),
            (server._metrics.rooms_open, "set"),
            (scheduler.state, "handle"),
        ):
            with monkeypatch.context() as patched:
                patched.setattr(where, name, broken)
                scheduler.now_s += 0.2  # expiry is due
                decode.send(protocol.Ping())
                time.sleep(0.15)  # time for the step to fail
            # What it lost was one message: the next one is answered.
            for _ in range(100):
                decode.send(protocol.Ping())
                try:
                    if isinstance(decode.receive(1.0), protocol.Pong):
                        break
                except TimeoutError:
                    pass
            else:
                raise AssertionError(f"nothing is served after {name} failed")
            while True:
                try:
                    decode.receive(0.1)
                except TimeoutError:
                    break
        settled(decode)
        steps = (
            "expiry", "expiry of rooms", "expiry of engines", "sending", "the loop", "looking at connections",
            "metrics", "handling a message",
        )  # fmt: skip
        counts = {step: scheduler.metric("dualpath_scheduler_faults_total", step=step) for step in steps}
        assert all(counts.values()), counts


def test_a_report_that_fails_is_answered_with_its_room_and_changes_nothing():
    class Broken:
        name = "broken"

        def choose(self, request):
            raise RuntimeError("broken policy")

    state = cluster_without_engines()
    state._path_policy = Broken()
    with running(state) as scheduler:
        prefill, decode = pair(scheduler)
        prefill.send(prefill_report(31, 0, 10))
        settled(prefill)
        before = snapshot(state)
        decode.send(decode_report(31, 0))
        reply = decode.receive(WAIT_S)
        assert (reply.code, reply.room) == (ErrorCode.INTERNAL, 31)
        assert snapshot(state) == before


# Memory


@contextmanager
def scheduler_process(*options: str):
    process = subprocess.Popen(
        [sys.executable, "-m", "scheduler_svc", "--bind", "tcp://127.0.0.1:0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process, process.stdout.readline().split()[-1]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def resident_mib(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


def handshaken(address: str) -> socket.socket:
    """A TCP connection after ZMTP 3.0's greeting and READY, mechanism NULL."""
    host, port = address.removeprefix("tcp://").split(":")
    made = socket.create_connection((host, int(port)), timeout=10)
    made.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32))
    greeting = b""
    while len(greeting) < 64:
        greeting += made.recv(64 - len(greeting))
    ready = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
    made.sendall(bytes([4, len(ready)]) + ready)
    made.recv(made.recv(2)[1])
    return made


def part(size: int, more: bool = True) -> bytes:
    """A frame of ZMTP."""
    if size < 256:
        return bytes([more, size]) + bytes(size)
    return bytes([2 | more]) + struct.pack(">Q", size) + bytes(size)


@pytest.mark.case("scheduler_endless_multipart_memory")
@pytest.mark.parametrize("size", [1 << 20, 4096, 0])
def test_a_message_that_never_ends_costs_its_sender_the_connection(size):
    with scheduler_process() as (process, address), SchedulerClient(address) as bystander:
        settled(bystander)
        before_mib = resident_mib(process.pid)
        vandal = handshaken(address)
        # What came before in whole does not excuse it.
        vandal.sendall(part(24, more=False))
        burst = part(size) * ((1 << 20) // len(part(size)) or 1)
        sent_mib = most_mib = 0
        with pytest.raises(OSError):
            while sent_mib < 1500:
                vandal.sendall(burst)
                sent_mib += 1
                time.sleep(0.003)  # as fast as a network, not as loopback
                most_mib = max(most_mib, resident_mib(process.pid) - before_mib)
        vandal.close()
        # An empty part of two bytes takes ZeroMQ 64.
        assert most_mib < 500, (sent_mib, most_mib)
        bystander.send(heartbeat("p0"))
        assert [one.engine.engine_id for one in bystander.status(WAIT_S).engines] == ["p0"]
        process.terminate()
        assert "no message ended" in process.stderr.read()


def test_one_long_message_after_another_is_no_endless_one():
    with running() as scheduler, scheduler.connect() as peer:
        for _ in range(60):
            peer.send_frames(b" " * MAX_MESSAGE_BYTES)
            assert isinstance(peer.receive(WAIT_S), Error)
        assert scheduler.metric("dualpath_scheduler_refused_connections_total", reason="endless") == 0


@pytest.mark.case("scheduler_done_lanes_memory")
def test_a_done_with_more_lanes_than_a_load_can_have_is_refused():
    with running() as scheduler:
        prefill, _ = pair(scheduler)
        lanes = [lane("store", page, page + 1) for page in range(MAX_LANES + 1)]
        prefill.send(done(1, "p0", *lanes))
        reply = prefill.receive(WAIT_S)
        assert (reply.code, reply.room) == (ErrorCode.MALFORMED, 1) and "lanes" in reply.message
        assert scheduler.state.rooms.open_count == 0
        prefill.send(done(1, "p0", *lanes[1:]))
        settled(prefill)
        assert scheduler.state.rooms.open_count == 1


def test_what_all_rooms_hold_together_is_bounded_and_the_oldest_go_first():
    state = cluster("decode", *(heartbeat("p0", rank=rank, tp_size=4) for rank in range(4)), heartbeat("d0"))
    state.rooms = RoomTable(max_records=100)
    lanes = [lane("store", page, page + 1) for page in range(4)]
    for room in range(50):
        for rank in range(4):
            state.handle(done(room, "p0", *lanes, rank=rank), 0.0)
        held = [*state.rooms._open.values(), *state.rooms._closed.values()]
        assert sum(room.records for room in held) == state.rooms._records <= 100
    assert list(state.rooms._open) == [45, 46, 47, 48, 49]
    # One room alone may be larger than that: it is the one at hand.
    state.rooms = RoomTable(max_records=3)
    state.handle(done(1, "p0", *lanes), 0.0)
    assert list(state.rooms._open) == [1]


def test_charges_and_reports_count_too_and_are_given_back():
    state = cluster()
    for room in range(20):
        state.handle(prefill_report(room, 0, 10), 0.0)
        state.handle(decode_report(room, 0), 0.0)
        state.handle(done(room, "p0"), 0.0)
        state.handle(done(room, "d0", lane("store", 0, 10)), 0.0)
    assert state.rooms._records == 20 * (2 + 1 + 1 + 2) < MAX_RECORDS
    state.expire(1000.0)
    assert state.rooms._records == 0


def test_a_peer_that_invents_engines_keeps_no_other_one_out():
    state = cluster_without_engines()
    state.engines = EngineTable(max_engines=20, max_ranks=30)
    state.engines.watch(state._placement_policy, state.faults)
    with running(state) as scheduler, scheduler.connect() as flooder:
        for number in range(100):
            flooder.send(heartbeat(f"p{number + 1}"))
        refused = 0
        for _ in range(80):
            reply = flooder.receive(WAIT_S)
            refused += reply.code is ErrorCode.CONFLICT and "registered already" in reply.message
        assert refused == 80
        prefill, decode = pair(scheduler)
        for number in range(100):
            flooder.send(heartbeat(f"p{number + 1}"))
        prefill.send(heartbeat("p0"))
        settled(prefill)
        names = {one.engine.engine_id for one in decode.status(WAIT_S).engines}
        assert {"p0", "d0"} <= names and len(names) == 20
        for rank in range(12):  # ranks are bounded too
            prefill.send(heartbeat("p200", rank=rank, tp_size=16))
        settled(prefill)
        assert len(state.engines._by_age) <= 30
        assert sum(state.engines._held.values()) == len(state.engines._by_age)


def test_a_fleet_that_is_too_large_is_told_so_and_those_that_are_in_stay():
    table = EngineTable(max_engines=3)
    state = Cluster(path_policy("decode"), placement_policy("round_robin"), started_s=0, engines=table)
    for number in range(5):
        state.handle(heartbeat(f"p{number}"), 0.0, sender=b"%d" % number)
    assert list(table._live) == ["p0", "p1", "p2"]


def test_metrics_of_engines_that_come_and_go_for_ever_are_bounded(monkeypatch):
    monkeypatch.setattr("scheduler_svc.telemetry.tally.MAX_SERIES", 3)
    metrics, state = Metrics(), cluster()
    for number in range(10):
        state.handle(heartbeat(f"p{number}"), 0.0)
        for event in state.handle(done(number, f"p{number}", lane("store", 0, 1)), 0.0).events:
            metrics(event)
    value = metrics.registry.get_sample_value
    assert value("dualpath_store_read_bytes_total", {"engine": "p0"}) == PAGE_BYTES
    assert value("dualpath_store_read_bytes_total", {"engine": "other"}) == 7 * PAGE_BYTES


def test_a_flood_of_refused_messages_fills_no_log(caplog):
    with caplog.at_level(logging.INFO), running() as scheduler, scheduler.connect() as vandal:
        pair(scheduler)
        for _ in range(300):
            vandal.send_frames(b"garbage")
            vandal.send(prefill_report(1, 0, 10, by="d0"))
        for _ in range(600):
            assert isinstance(vandal.receive(WAIT_S), Error)
        lines = [record for record in caplog.records if record.name.startswith("scheduler_svc")]
        assert len(lines) <= 2 * MOST_LINES
        assert scheduler.metric("dualpath_scheduler_errors_total", code="malformed") == 300


def test_lines_left_out_are_counted(caplog):
    now_s = 0.0
    log = LimitedLog(logging.getLogger("flooded"), lambda: now_s)
    for _ in range(500):
        log.log(logging.WARNING, "refused %d", 7)
    log.log(logging.WARNING, "another kind")
    now_s = PERIOD_S
    log.tick()
    assert [record.getMessage() for record in caplog.records] == [
        *["refused 7"] * MOST_LINES,
        "another kind",
        f"{500 - MOST_LINES} more within 10 s like 'refused %d'",
    ]


def test_a_peer_that_cannot_even_shake_hands_is_counted_and_named_in_the_log(caplog):
    with caplog.at_level(logging.INFO), running() as scheduler:
        host, port = scheduler.address.removeprefix("tcp://").split(":")
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32))
            while stranger.recv(4096):
                pass
            whence = f"127.0.0.1:{stranger.getsockname()[1]}"
        refused = "dualpath_scheduler_refused_connections_total"
        for _ in range(int(WAIT_S * 100)):
            if scheduler.metric(refused, reason="protocol"):
                break
            time.sleep(0.01)
        assert scheduler.metric(refused, reason="protocol") == 1
        lines = [line for line in caplog.messages if line.startswith("refused a connection")]
        # On a busy machine it has left before it was looked at.
        assert len(lines) == 1 and (whence in lines[0] or "a peer that left" in lines[0]), lines


# Status


def full_load(rate: float) -> Workload:
    counts = dict.fromkeys(Workload.__struct_fields__, MAX_COUNT)
    return Workload(**counts | dict.fromkeys(("read_rate_bytes_per_s", "compute_rate_tokens_per_s"), rate))


@pytest.mark.case("status_breaks")
def test_the_status_can_be_read_whatever_was_accepted():
    with running() as scheduler, scheduler.connect() as peer:
        for rank in (0, 1):
            peer.send(heartbeat("p0", rank=rank, tp_size=2, load=full_load(1e15)))
        for room in range(3):
            huge = protocol.LaneRecord("store", 0, 1, MAX_COUNT, 0.0, 0.0)
            peer.send(done(room, "p0", huge, loaded=MAX_COUNT))
        found = peer.status(WAIT_S).engines[0]
        assert found.load.unplanned_read_bytes == found.loaded_pages == found.store_read_bytes == MAX_COUNT
        assert found.load.read_rate_bytes_per_s == 1e15


@pytest.mark.case("status_breaks")
@pytest.mark.parametrize("count", [0, 1, STATUS_ENGINES, STATUS_ENGINES + 1, 1000])
def test_a_status_of_any_number_of_engines_comes_in_pages(count):
    with running() as scheduler, scheduler.connect() as peer:
        for number in range(count):
            peer.send(heartbeat(f"p{number}"))
        settled(peer)
        status = peer.status(WAIT_S)
        assert [one.engine.engine_id for one in status.engines] == [f"p{number}" for number in range(count)]
        assert status.next is None


def test_engines_that_come_and_go_between_two_pages_disturb_no_other():
    state = cluster("decode", *(heartbeat(f"p{number}") for number in range(2 * STATUS_ENGINES)))
    ask = protocol.StatusRequest
    first = state.handle(ask(), 0.0).reply
    state.engines.forget(state.engines.keys_of("p0")[0])
    state.engines.forget(state.engines.keys_of(f"p{STATUS_ENGINES}")[0])
    state.handle(heartbeat("p0"), 0.0)
    second = state.handle(ask(after=first.next), 0.0).reply
    names = [one.engine.engine_id for one in second.engines]
    assert names == [*(f"p{number}" for number in range(STATUS_ENGINES + 1, 2 * STATUS_ENGINES)), "p0"]
    assert second.next is None


def test_the_longest_page_of_a_status_fits_into_a_message():
    state = cluster_without_engines()
    wide = "\U0001f4a5" * 250
    full = full_load(1.1234567890123e14)
    host = ".".join(["h" * 60] * 3)
    for number in range(STATUS_ENGINES):
        described = engine(
            f"d{number:03d}{wide}", fingerprint=wide, url=f"https://{host}:30000",
            page_endpoint=f"tcp://{host}:30000", rank=1023, tp_size=1024, bootstrap_port=65535,
            page_size=2**20, page_bytes=2**40, helped=True, objects="\U0001f4a5" * 64,
            fetch_endpoint=f"tcp://{host}:30000",
        )  # fmt: skip
        assert state.handle(Heartbeat(engine=described, load=full, version=2), 0.0).reply is None
    for number in range(MAX_FALLBACK_REASONS + 5):
        state.handle(done(number, f"d000{wide}", rank=1023, reason=f"{number:03d}{wide}"), 0.0)
    page = encode(state.handle(protocol.StatusRequest(), 1e8).reply)
    page = encode(state.handle(protocol.StatusRequest(), 0.0).reply) if b"d000" not in page else page
    assert 100_000 < len(page) <= MAX_MESSAGE_BYTES
    assert len(decode_reply(page).engines) == STATUS_ENGINES


def test_an_answer_that_cannot_be_read_is_an_error_in_a_sentence():
    with running() as scheduler, scheduler.connect() as peer:
        scheduler.state.errors = -1  # stands for whatever a newer scheduler may say
        with pytest.raises(SchedulerError, match="errors: .*same release"):
            peer.status(WAIT_S)


# Who speaks for an engine


def test_a_second_connection_cannot_speak_for_a_live_engine():
    with running() as scheduler, scheduler.connect() as stranger:
        prefill, decode = scheduler.connect(), scheduler.connect()
        for peer, name in ((prefill, "p0"), (decode, "d0")):
            peer.send(introduced(heartbeat(name)))
            assert isinstance(peer.receive(WAIT_S), protocol.Accepted)
        before = snapshot(scheduler.state)
        for message in (
            introduced(heartbeat("d0", page_endpoint="tcp://127.0.0.1:6666")),
            introduced(heartbeat("d0", fingerprint="other")),
            introduced(heartbeat("d0")),
            heartbeat("d0"),
            decode_report(5, 0),
            done(5, "d0", reason="gone"),
        ):
            stranger.send(message)
            reply = stranger.receive(WAIT_S)
            assert reply.code is ErrorCode.CONFLICT and "another live connection" in reply.message
            assert reply.room == getattr(message, "room", None)
        assert snapshot(scheduler.state) == before
        prefill.send(prefill_report(5, 0, 10))
        decode.send(decode_report(5, 0))
        assert plan_from(prefill).decode_endpoints == (engine("d0").page_endpoint,)
        assert plan_from(decode).room == 5
        with pytest.raises(TimeoutError):
            stranger.receive(0.2)


def introduced(beat: Heartbeat, version: int = protocol.PROTOCOL_VERSION) -> Heartbeat:
    return Heartbeat(beat.engine, beat.load, version=version, oldest_version=version, hello=True)


def plan_from(peer: SchedulerClient) -> Plan:
    """The next plan: whether a connection still lives is asked with a message of its own."""
    while not isinstance(message := peer.receive(WAIT_S), Plan):
        assert isinstance(message, protocol.Pong), message
    return message


def accepted(peer: SchedulerClient, beat: Heartbeat) -> None:
    """Say it until it is taken, as an engine does once a second."""
    for _ in range(1000):
        peer.send(introduced(beat))
        reply = peer.receive(WAIT_S)
        if isinstance(reply, protocol.Accepted):
            return
        assert reply.code is ErrorCode.CONFLICT, reply
        time.sleep(0.01)
    raise AssertionError("it is never accepted")


def test_an_engine_that_restarts_is_taken_as_soon_as_its_old_connection_is_closed():
    with running() as scheduler:  # and no time passes, so nothing expires
        ranks = [scheduler.connect() for _ in range(2)]
        for rank, peer in enumerate(ranks):
            accepted(peer, heartbeat("d0", rank=rank, tp_size=2))
        for peer in ranks:
            peer.close()
        reborn = scheduler.connect()
        accepted(reborn, heartbeat("d0", url="http://elsewhere:1", page_endpoint="tcp://elsewhere:2"))
        found = reborn.status(WAIT_S).engines
        assert [(one.engine.url, one.engine.tp_size) for one in found] == [("http://elsewhere:1", 1)]


def test_an_engine_that_only_connects_anew_keeps_what_was_planned_for_it():
    with running() as scheduler:
        prefill, decode = pair(scheduler)
        prefill.send(prefill_report(1, 0, 10))
        decode.send(decode_report(1, 0))
        assert plan_from(decode).split_page == 10
        decode.close()
        again = scheduler.connect()
        accepted(again, heartbeat("d0"))
        assert scheduler.state.engines.get("d0").ranks[0].planned_bytes == 10 * PAGE_BYTES


def test_new_weights_change_later_plans_and_no_earlier_one():
    with running() as scheduler:
        prefill, decode = pair(scheduler)
        prefill.send(prefill_report(1, 0, 10))
        decode.send(decode_report(1, 0))
        before = plan_from(prefill)
        prefill.send(heartbeat("p0", fingerprint="weights-2"))
        settled(prefill)
        prefill.send(prefill_report(1, 0, 10))  # a rank that was late
        assert plan_from(prefill) == before
        prefill.send(prefill_report(2, 0, 10))
        decode.send(decode_report(2, 0))
        assert plan_from(prefill).split_page == 0
        decode.send(heartbeat("d0", fingerprint="weights-2"))
        settled_but_for_plans(decode)
        prefill.send(prefill_report(3, 0, 10))
        decode.send(decode_report(3, 0))
        assert plan_from(prefill).split_page == 10


def settled_but_for_plans(peer: SchedulerClient) -> None:
    peer.send(protocol.Ping())
    while not isinstance(peer.receive(WAIT_S), protocol.Pong):
        pass


@pytest.mark.case("engine_over_two_hosts")
def test_ranks_on_two_hosts_are_one_engine_at_the_address_of_rank_0():
    hosts = ("10.0.0.1", "10.0.0.2")
    ranks = [
        heartbeat("d0", rank=rank, tp_size=4, url=f"http://{hosts[rank // 2]}:30000",
                  page_endpoint=f"tcp://{hosts[rank // 2]}:{5000 + rank}")
        for rank in (2, 3, 0, 1)
    ]  # fmt: skip
    state = cluster("decode", heartbeat("p0"), *ranks, placement="affinity")
    placed = state.handle(Place(request_id="r", prompt_tokens=1), 1.0).reply
    assert placed.decode.url == "http://10.0.0.1:30000"
    moved = heartbeat("d0", rank=2, tp_size=4, url="http://10.0.0.9:30000")
    assert state.handle(moved, 1.0).reply.code is ErrorCode.CONFLICT, "a live rank stays where it is"


# Versions and prompts


@pytest.mark.parametrize(("version", "oldest"), [(9, 8), (2**31 - 1, 3)])
def test_a_peer_of_a_later_time_is_refused_with_both_versions_and_the_remedy(version, oldest):
    state = cluster()
    before = snapshot(state)
    for message in (
        Heartbeat(engine("p5"), version=version, oldest_version=oldest, hello=True),
        Place(request_id="r", prompt_tokens=1, version=version, oldest_version=oldest),
    ):
        reply = state.handle(message, 0.0).reply
        assert reply.code is ErrorCode.VERSION and snapshot(state) == before
        ours = f"1 to {protocol.PROTOCOL_VERSION}"
        for words in (f"{oldest} to {version}", ours, "DualPath of the scheduler"):
            assert words in reply.message


def test_a_peer_whose_versions_ended_long_ago_is_refused(monkeypatch):
    state = cluster()
    monkeypatch.setattr("scheduler_svc.state.OLDEST_VERSION", 2)
    reply = state.handle(heartbeat("p1"), 0.0).reply
    assert reply.code is ErrorCode.VERSION and "DualPath of this peer" in reply.message


def test_a_newer_peer_that_still_speaks_our_version_is_accepted_with_it():
    newer = Heartbeat(engine("p5"), version=9, oldest_version=2, hello=True)
    assert cluster().handle(newer, 0.0).reply == protocol.Accepted(version=2)


def test_engines_without_a_common_version_exchange_no_pages():
    state = cluster("decode", heartbeat("p0"), Heartbeat(engine("d0"), version=2, oldest_version=2))
    state.handle(prefill_report(1, 0, 10), 0.0)
    assert plan_of(state.handle(decode_report(1, 4), 0.0)).split_page == 0
    assert state.fallbacks == {"versions_differ": 1}


HASHES = "a" * 64, "b" * 64


@pytest.mark.parametrize(
    ("prefill", "decode", "split_page"),
    [
        ({"prompt_hash": HASHES[0]}, {"prompt_hash": HASHES[0]}, 10),
        ({"prompt_hash": HASHES[0]}, {}, 10),
        ({}, {"prompt_hash": HASHES[0]}, 10),
        ({"prompt_hash": HASHES[0]}, {"prompt_hash": HASHES[1]}, 0),
    ],
)
def test_pages_move_only_between_reports_that_mean_one_prompt(prefill, decode, split_page):
    state = cluster()
    state.handle(prefill_report(1, 0, 10, **prefill), 0.0)
    result = state.handle(decode_report(1, 4, **decode), 0.0)
    assert plan_of(result).split_page == split_page
    assert state.fallbacks == ({} if split_page else {"prompt_differs": 1})


def test_prompts_of_different_lengths_are_different_prompts():
    state = cluster()
    state.handle(prefill_report(1, 0, 10), 0.0)
    other = protocol.Report(room=1, engine_id="d0", role=Role.DECODE, prompt_tokens=99_999, local_pages=4)
    result = state.handle(other, 0.0)
    assert plan_of(result).split_page == 0 and state.fallbacks == {"prompt_differs": 1}
    counted = [event for event in result.events if getattr(event, "reason", None) == "prompt_differs"]
    assert len(counted) == 1


@pytest.mark.parametrize("planned", [False, True])
def test_a_second_report_of_a_room_with_another_prompt_is_refused_and_changes_nothing(planned):
    state = cluster()
    state.handle(prefill_report(1, 0, 10, prompt_hash=HASHES[0]), 0.0)
    if planned:
        state.handle(decode_report(1, 0, prompt_hash=HASHES[0]), 0.0)
    before = snapshot(state)
    reply = state.handle(prefill_report(1, 0, 10, prompt_hash=HASHES[1]), 0.0).reply
    assert (reply.code, reply.room) == (ErrorCode.CONFLICT, 1) and "prompt_hash" in reply.message
    assert snapshot(state) == before


def test_rooms_are_drawn_so_that_nobody_can_guess_the_next_one():
    state = cluster()
    assert type(state._rng).__name__ == "SystemRandom"
    rooms = [state.handle(Place(request_id="r", prompt_tokens=1), 0.0).reply.room for _ in range(50)]
    assert len(set(rooms)) == 50


def test_faults_of_engines_are_counted_from_their_heartbeats():
    metrics, state = Metrics(), cluster_without_engines()
    for faults, rank in ((0, 0), (3, 0), (3, 0), (4, 1), (5, 0), (0, 0), (1, 0)):
        beat = heartbeat("p0", rank=rank, tp_size=2, load=Workload(faults=faults))
        for event in state.handle(beat, 0.0).events:
            metrics(event)
    total = metrics.registry.get_sample_value("dualpath_engine_faults_total", {"engine": "p0"})
    assert total == 3 + 4 + 2 + 1
