"""Whatever arrives, over real sockets: an error reply or a counted drop, and nothing has changed."""

from __future__ import annotations

import itertools
import json
import socket
from contextlib import suppress
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scheduler_vocabulary import (
    decode_report,
    done,
    engine,
    heartbeat,
    is_a_message,
    lane,
    prefill_report,
    relay_beat,
    snapshot,
)
from test_scheduler_server import WAIT_S, pair, running

from scheduler_svc.wire.protocol import Error, ErrorCode, Mode, Ping, Place, StatusRequest, encode

VALID = [
    encode(message)
    for message in (
        heartbeat("p0"),
        heartbeat("p1", mode=Mode.RELAY, hello=True, version=2),
        relay_beat("relay-a", hello=True, queue_bytes=1, read_rate_bytes_per_s=2.5, draining=True),
        Place(request_id="r", session_id="s", prompt_tokens=1000),
        prefill_report(1, 0, 10),
        decode_report(1, 0),
        done(1, "p0", lane("store", 0, 10)),
        StatusRequest(),
        Ping(),
    )
]
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


def paths(value, path=()):
    """Every place inside a JSON value."""
    yield path
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        yield from paths(child, (*path, key))


@st.composite
def damaged(draw) -> bytes:
    """A valid message with bytes flipped, cut or repeated, or one value anywhere replaced."""
    frame = draw(st.sampled_from(VALID))
    match draw(st.sampled_from(["flip", "cut", "repeat", "replace", "nest"])):
        case "flip":
            damaged = bytearray(frame)
            for position in draw(st.lists(st.integers(0, len(frame) - 1), min_size=1, max_size=4)):
                damaged[position] ^= draw(st.integers(1, 255))
            return bytes(damaged)
        case "cut":
            return frame[: draw(st.integers(0, len(frame) - 1))]
        case "repeat":
            return frame * draw(st.integers(2, 4))
        case "nest":
            return b"[" * draw(st.integers(1, 5000)) + frame
    message = json.loads(frame)
    path = draw(st.sampled_from([path for path in paths(message) if path]))
    inside = message
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = draw(values)
    return json.dumps(message).encode()


def test_damaged_messages_are_refused_and_change_nothing_or_are_messages_themselves():
    with running() as scheduler, scheduler.connect() as stranger:
        pair(scheduler)
        turns = itertools.count()

        @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(damaged(), min_size=1, max_size=2))
        def throw(frames):
            before, errors = snapshot(scheduler.state), scheduler.state.errors
            marker = f"marker-{next(turns)}"
            stranger.send_frames(*frames)
            stranger.send_frames(f'{{"type":"{marker}"}}'.encode())
            replies = [stranger.receive(WAIT_S)]
            while not (isinstance(replies[-1], Error) and marker in replies[-1].message):
                replies.append(stranger.receive(WAIT_S))
            refusals = [reply for reply in replies[:-1] if isinstance(reply, Error)]
            assert scheduler.state.errors == errors + len(refusals) + 1
            if not is_a_message(frames):
                assert [refusal.code for refusal in refusals] == [ErrorCode.MALFORMED]
            if refusals:
                assert snapshot(scheduler.state) == before

        throw()


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\xff" + bytes(8) + b"\x7f" + b"A" * 100_000,  # a ZMTP greeting that goes wrong
        b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48) + b"\x06" + b"\xff" * 64,
        bytes(200_000),
    ],
)
def test_bytes_that_are_not_zeromq_cost_their_connection_only(garbage):
    with running() as scheduler:
        prefill, _ = pair(scheduler)
        before = snapshot(scheduler.state)
        address = urlsplit(scheduler.address)
        with socket.create_connection((address.hostname, address.port)) as raw, suppress(OSError):
            raw.settimeout(WAIT_S)
            raw.sendall(garbage)
            raw.shutdown(socket.SHUT_WR)
            while raw.recv(4096):
                pass
        assert len(prefill.status(WAIT_S).engines) == 2
        assert snapshot(scheduler.state) == before


def test_one_peer_that_floods_garbage_does_not_keep_another_from_its_answer():
    with running() as scheduler, scheduler.connect() as vandal:
        prefill, _ = pair(scheduler)
        for _ in range(2000):
            vandal.send_frames(b"garbage")
        assert prefill.status(WAIT_S).engines[0].engine == engine("p0")
        for _ in range(2000):
            assert isinstance(vandal.receive(WAIT_S), Error)
