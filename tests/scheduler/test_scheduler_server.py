"""The server over real ZeroMQ sockets on loopback."""

from __future__ import annotations

import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import zmq
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from scheduler_vocabulary import (
    PAGE_BYTES,
    cluster,
    decode_report,
    done,
    engine,
    heartbeat,
    is_a_message,
    lane,
    prefill_report,
    snapshot,
)

from scheduler_svc import http_side
from scheduler_svc.ledger.engines import ENGINE_EXPIRY_S
from scheduler_svc.ledger.rooms import ROOM_TTL_S
from scheduler_svc.metrics import Metrics
from scheduler_svc.server import MAX_FRAME_BYTES, BindRefused, Server, check_bind
from scheduler_svc.wire.client import SchedulerClient, SchedulerError
from scheduler_svc.wire.protocol import MAX_MESSAGE_BYTES, Error, ErrorCode, Path, Place, Plan, Status

WAIT_S = 30.0
"""How long a test waits for what must come; nothing passes or fails by how soon it does."""


class Running:
    """A server in a thread, and everything connected to it.  Time stands still unless a test moves it."""

    def __init__(self, state, observers=(), context=None, **options) -> None:
        self.state = state
        self.now_s = 0.0
        self.metrics = Metrics()
        self._context = context or zmq.Context()
        self._server = Server(
            "tcp://127.0.0.1:0",
            state,
            self.metrics,
            observers=observers,
            context=self._context,
            now_s=lambda: self.now_s,
            **options,
        )
        self.address = self._server.address
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()

    def connect(self) -> SchedulerClient:
        return SchedulerClient(self.address, self._context)

    def metric(self, name: str, **labels) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    def answers(self, timeout_s: float) -> bool:
        return self._server.answers(timeout_s)

    def stop(self) -> None:
        self._server.stop()
        self._thread.join()

    def close(self) -> None:
        self.stop()
        self._context.destroy(linger=0)


@contextmanager
def running(state=None, observers=()) -> Iterator[Running]:
    made = Running(state or cluster_without_engines(), observers)
    try:
        yield made
    finally:
        made.close()


def cluster_without_engines(policy="decode"):
    state = cluster(policy)
    state.expire(1e9)
    return state


def settled(peer: SchedulerClient) -> None:
    """Return when the server has handled everything this peer sent."""
    peer.status(WAIT_S)


def pair(scheduler: Running) -> tuple[SchedulerClient, SchedulerClient]:
    """A PE and a DE whose heartbeats have been handled."""
    prefill, decode = scheduler.connect(), scheduler.connect()
    for peer, name in ((prefill, "p0"), (decode, "d0")):
        peer.send(heartbeat(name))
        settled(peer)
    return prefill, decode


def test_one_request_from_reports_to_done():
    with running() as scheduler:
        prefill, decode = pair(scheduler)
        prefill.send(prefill_report(7, 0, 10))
        decode.send(decode_report(7, 0))
        plans = [peer.receive(WAIT_S) for peer in (prefill, decode)]
        assert plans[0] == plans[1] and isinstance(plans[0], Plan)
        assert plans[0].path is Path.DECODE
        prefill.send(done(7, "p0", lane("peer", 0, 10), loaded=10))
        settled(prefill)
        decode.send(done(7, "d0", lane("store", 0, 10), reason="slow", loaded=10))
        status = decode.status(WAIT_S)
        assert (status.rooms_open, status.rooms_closed, status.errors) == (0, 1, 0)
        assert status.paths == {Path.DECODE: 1} and status.policy == "decode"
        read = {entry.engine.engine_id: entry.store_read_bytes for entry in status.engines}
        assert read == {"p0": 0, "d0": 10 * PAGE_BYTES}

        settled(decode)  # observers come after the answers
        assert scheduler.metric("dualpath_plans_total", path="decode") == 1
        assert scheduler.metric("dualpath_fallbacks_total", reason="slow") == 1
        assert scheduler.metric("dualpath_store_read_bytes_total", engine="d0") == 10 * PAGE_BYTES
        assert scheduler.metric("dualpath_forwarded_bytes_total", engine="p0") == 10 * PAGE_BYTES
        assert scheduler.metric("dualpath_plan_seconds_count") == 1


def test_a_router_gets_a_placement_or_a_clear_error():
    with running() as scheduler, scheduler.connect() as router:
        with pytest.raises(SchedulerError, match="no live prefill engine") as refusal:
            router.place(Place(request_id="r", prompt_tokens=1), WAIT_S)
        assert refusal.value.error.request_id == "r"
        pair(scheduler)
        placement = router.place(Place(request_id="r", prompt_tokens=1), WAIT_S)
        assert (placement.prefill, placement.decode) == (engine("p0"), engine("d0"))


@pytest.mark.parametrize(
    "frames",
    [(b"",), (b"garbage",), (b'{"type":"nope"}',), (b"{}", b"{}"), (b"", b'{"type":"status_request"}')],
)
def test_a_malformed_message_is_answered_and_counted_and_changes_nothing(frames):
    with running() as scheduler, scheduler.connect() as stranger:
        pair(scheduler)
        before, errors = snapshot(scheduler.state), scheduler.state.errors
        stranger.send_frames(*frames)
        reply = stranger.receive(WAIT_S)
        assert isinstance(reply, Error) and reply.code is ErrorCode.MALFORMED
        assert snapshot(scheduler.state) == before and scheduler.state.errors == errors + 1
        assert scheduler.metric("dualpath_scheduler_errors_total", code="malformed") == 1


def test_random_frames_never_end_the_loop_or_change_the_engines():
    with running() as scheduler, scheduler.connect() as stranger:
        pair(scheduler)
        before = snapshot(scheduler.state)

        @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(st.binary(max_size=200), min_size=1, max_size=3))
        def throw(frames):
            assume(not is_a_message(frames))
            stranger.send_frames(*frames)
            assert isinstance(stranger.receive(WAIT_S), Error)

        throw()
        assert snapshot(scheduler.state) == before


def eventual_status(peer: SchedulerClient) -> Status:
    """What was under way when a connection broke is lost: ask until an answer comes."""
    for _ in range(int(WAIT_S)):
        with suppress(TimeoutError):
            return peer.status(timeout_s=1.0)
    raise AssertionError("the peer never got through again")


def test_an_oversized_message_is_answered_and_a_huge_one_costs_the_connection_only():
    with running() as scheduler, scheduler.connect() as stranger:
        stranger.send_frames(b" " * (MAX_MESSAGE_BYTES + 1))
        assert "exceeds" in stranger.receive(WAIT_S).message
        with scheduler.connect() as vandal:
            vandal.send_frames(b" " * (MAX_FRAME_BYTES + 1))
            assert eventual_status(vandal).errors == 1
        assert stranger.status(WAIT_S).errors == 1


def test_a_fault_in_one_message_is_answered_and_the_next_is_served():
    # A policy that raises stands for any fault of ours: no message can cause one on purpose.
    class Broken:
        name = "broken"

        def choose(self, request):
            raise RuntimeError("broken policy")

    state = cluster_without_engines()
    state._path_policy = Broken()
    with running(state) as scheduler:
        prefill, decode = pair(scheduler)
        prefill.send(prefill_report(1, 0, 10))
        settled(prefill)
        before = snapshot(state)
        decode.send(decode_report(1, 0))
        reply = decode.receive(WAIT_S)
        assert isinstance(reply, Error) and reply.code is ErrorCode.INTERNAL
        assert snapshot(state) == before
        assert decode.status(WAIT_S).errors == 1


def test_a_failing_observer_keeps_no_plan_from_its_engines():
    # The observer raises on purpose: stands for a tracing fault.
    def broken(event):
        raise RuntimeError("broken observer")

    seen = []
    with running(observers=[broken, seen.append]) as scheduler:
        prefill, decode = pair(scheduler)
        prefill.send(prefill_report(1, 0, 10))
        decode.send(decode_report(1, 0))
        assert isinstance(prefill.receive(WAIT_S), Plan) and isinstance(decode.receive(WAIT_S), Plan)
        assert decode.status(WAIT_S).errors == 0
        settled(decode)
        assert len(seen) == 1


def test_a_restarted_peer_gets_plans_under_its_new_identity():
    with running() as scheduler:
        prefill, decode = pair(scheduler)
        prefill.send(prefill_report(1, 0, 10))
        settled(prefill)
        prefill.close()
        reborn = scheduler.connect()
        reborn.send(heartbeat("p0"))
        settled(reborn)
        decode.send(decode_report(1, 0))
        assert reborn.receive(WAIT_S) == decode.receive(WAIT_S)


def test_an_engine_expires_with_the_servers_clock_though_nobody_speaks():
    with running() as scheduler:
        prefill, _ = pair(scheduler)
        assert len(prefill.status(WAIT_S).engines) == 2
        scheduler.now_s = ENGINE_EXPIRY_S + 1
        while scheduler.state.engines.get("p0") is not None:
            time.sleep(0.01)
        prefill.send(prefill_report(1, 0, 10))
        assert prefill.receive(WAIT_S).code is ErrorCode.UNKNOWN_ENGINE


def test_a_plan_for_a_peer_that_left_is_counted_and_the_other_side_gets_its_own():
    with running() as scheduler:
        prefill, decode = pair(scheduler)
        rooms = range(2000)
        for room in rooms:
            prefill.send(prefill_report(room, 0, 10))
        settled(prefill)
        prefill.close()
        # The server's socket notices in its own time: go on until a plan could not be delivered.
        for room in rooms:
            decode.send(decode_report(room, 0))
            assert decode.receive(WAIT_S).room == room
            settled(decode)
            if scheduler.metric("dualpath_scheduler_undelivered_total"):
                break
        assert scheduler.metric("dualpath_scheduler_undelivered_total") > 0


@pytest.mark.parametrize(
    "address",
    ["tcp://0.0.0.0:5557", "tcp://*:5557", "tcp://192.0.2.1:5557", "tcp://example.org:1", "tcp://[::]:1"],
)
def test_an_address_that_others_can_reach_is_refused_unless_forced(address):
    with pytest.raises(BindRefused, match="--insecure-bind"):
        check_bind(address, insecure=False)
    check_bind(address, insecure=True)


@pytest.mark.parametrize(
    "address", ["5557", "tcp://", "tcp://127.0.0.1", "udp://127.0.0.1:1", "ipc:///tmp/x", ""]
)
def test_an_address_of_another_form_is_refused_even_when_forced(address):
    with pytest.raises(BindRefused, match="tcp://HOST:PORT"):
        check_bind(address, insecure=True)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "tcp://localhost:1", "tcp://[::1]:1"])
def test_local_addresses_are_accepted(address):
    check_bind(address, insecure=False)


def test_a_second_scheduler_on_one_address_is_refused():
    with running() as scheduler, pytest.raises(BindRefused, match="another scheduler"):
        Server(scheduler.address, cluster(), Metrics())


def test_a_room_that_never_ends_is_in_the_metrics():
    with running() as scheduler:
        prefill, _decode = pair(scheduler)
        prefill.send(prefill_report(7, 0, 10))
        settled(prefill)
        assert scheduler.metric("dualpath_rooms_forgotten_total") == 0
        scheduler.now_s += ROOM_TTL_S + 1
        deadline_s = time.monotonic() + WAIT_S
        while scheduler.metric("dualpath_rooms_forgotten_total") != 1:
            assert time.monotonic() < deadline_s, "it is not counted"
            time.sleep(0.01)
        assert scheduler.metric("dualpath_rooms_open") == 0


def fetch(port: int, path: str, host: str = "127.0.0.1") -> tuple[int, str]:
    """Status and text of a GET."""
    try:
        with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=WAIT_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


class Loop:
    """Asked for its health only."""

    def __init__(self, answers=lambda: True) -> None:
        self.answers = answers


@pytest.mark.parametrize(("bound", "host"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
def test_metrics_are_served_over_http(bound, host):
    metrics = Metrics()
    port = http_side.serve(metrics.registry, Loop(), 0, bound)
    metrics.rooms_open.set(3)
    assert "dualpath_rooms_open 3.0" in fetch(port, "/metrics", host)[1]


def test_its_own_loop_answers_for_its_health():
    with running() as scheduler:
        port = http_side.serve(
            scheduler.metrics.registry, Loop(lambda: scheduler.answers(WAIT_S)), 0, "127.0.0.1"
        )
        assert fetch(port, "/healthz") == (200, "ok\n")


def test_a_loop_that_has_ended_is_not_healthy_though_its_metrics_are_still_served():
    with running() as scheduler:
        scheduler.stop()
        port = http_side.serve(
            scheduler.metrics.registry, Loop(lambda: scheduler.answers(0.01)), 0, "127.0.0.1"
        )
        assert fetch(port, "/healthz")[0] == 503
        assert fetch(port, "/metrics")[0] == 200


def test_a_client_without_a_scheduler_times_out_naming_the_address():
    with SchedulerClient("tcp://127.0.0.1:9") as client:
        with pytest.raises(TimeoutError, match="tcp://127.0.0.1:9"):
            client.status(timeout_s=0.1)
