from __future__ import annotations

import json
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduler_vocabulary import cluster, prefill_report

from scheduler_svc.wire import protocol
from scheduler_svc.wire.protocol import MAX_MESSAGE_BYTES, Role, decode_reply, decode_request, encode

names = st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), min_size=1, max_size=20)
counts = st.integers(0, 2**53)
rooms = st.integers(0, 2**63 - 1)
floats = st.floats(0, 1e9)
small = st.integers(1, protocol.MAX_RANKS)
ranks = st.integers(0, protocol.MAX_RANKS - 1)
hosts = st.sampled_from(["127.0.0.1", "[::1]", "[2001:db8::7]", "prefill-0.cell_1.example.", "h"])
addresses = st.builds("{}:{}".format, hosts, st.integers(1, 65535))
urls = st.builds("{}://{}".format, st.sampled_from(["http", "https"]), hosts | addresses)
endpoints = st.builds("tcp://{}".format, addresses)
versions = st.integers(1, 2**31 - 1)
engines = st.builds(
    protocol.RankInfo, engine_id=names, role=st.sampled_from(Role), rank=ranks, tp_size=small,
    url=urls, bootstrap_port=st.none() | st.integers(1, 65535), page_endpoint=st.none() | endpoints,
    fingerprint=names, page_size=small, page_bytes=small, mode=st.sampled_from(protocol.Mode),
)  # fmt: skip
loads = st.builds(
    protocol.Workload, sequences=counts, tokens=counts, read_queue_bytes=counts, read_rate_bytes_per_s=floats,
    host_free_pages=counts, device_free_tokens=counts, ready_tokens=counts, compute_rate_tokens_per_s=floats,
)  # fmt: skip
relays = st.builds(protocol.RelayInfo, name=names, endpoint=endpoints, ring_bytes=counts)
relay_loads = st.builds(
    protocol.RelayLoad, queue_bytes=counts, read_rate_bytes_per_s=floats, ring_free_bytes=counts,
    clients=counts, read_bytes=counts, draining=st.booleans(), faults=counts,
)  # fmt: skip
lanes = st.builds(
    lambda ends, **rest: protocol.LaneRecord(first_page=min(ends), end_page=max(ends), **rest),
    ends=st.tuples(counts, counts), lane=st.sampled_from(["store", "peer"]), bytes=counts, queue_s=floats,
    busy_s=floats,
)  # fmt: skip
traceparents = st.none() | st.from_regex(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", fullmatch=True)
hashes = st.none() | st.text("0123456789abcdef", min_size=1, max_size=64)


@st.composite
def reports(draw):
    low, high = sorted(draw(st.tuples(counts, counts)))
    role = draw(st.sampled_from(Role))
    return protocol.Report(
        room=draw(rooms), engine_id=draw(names), role=role, rank=draw(ranks),
        prompt_tokens=draw(counts), local_pages=low, hit_pages=high if role is Role.PREFILL else None,
        traceparent=draw(traceparents), prompt_hash=draw(hashes),
    )  # fmt: skip


requests = st.one_of(
    st.builds(
        protocol.Heartbeat, engine=engines, load=loads, version=versions, oldest_version=versions,
        hello=st.booleans(),
    ),
    st.builds(
        protocol.RelayHeartbeat, relay=relays, load=relay_loads, version=versions, oldest_version=versions,
        hello=st.booleans(),
    ),
    st.builds(
        protocol.Place, request_id=names, session_id=st.none() | names, prompt_tokens=counts,
        traceparent=traceparents, version=versions, oldest_version=versions,
    ),
    reports(),
    st.builds(
        protocol.Done, room=rooms, engine_id=names, role=st.sampled_from(Role), rank=ranks,
        outcome=st.sampled_from(protocol.Outcome), fallback_reason=st.none() | names, loaded_pages=counts,
        lanes=st.lists(lanes, max_size=3).map(tuple),
    ),
    st.builds(protocol.StatusRequest, after=counts, relays=st.booleans()),
    st.just(protocol.Ping()),
)  # fmt: skip
replies = st.one_of(
    st.builds(protocol.Accepted, version=versions),
    st.builds(protocol.Placement, request_id=names, room=rooms, prefill=engines, decode=engines),
    st.builds(
        protocol.Plan, room=rooms, path=st.sampled_from(protocol.Path), prefill_id=names, decode_id=names,
        prefill_local_pages=counts, decode_local_pages=counts, hit_pages=counts, split_page=counts,
        decode_endpoints=st.lists(endpoints, max_size=3).map(tuple), policy=names,
    ),
    st.builds(
        protocol.Status, policy=names, uptime_s=floats,
        engines=st.lists(
            st.builds(protocol.EngineStatus, engine=engines, load=loads, age_s=floats), max_size=2
        ).map(tuple),
        rooms_open=counts, rooms_closed=counts, rooms_forgotten=counts,
        paths=st.dictionaries(st.sampled_from(protocol.Path), counts, max_size=4),
        fallbacks=st.dictionaries(names, counts, max_size=3), duplicate_store_pages=counts, errors=counts,
        next=st.none() | counts, relay_count=counts,
        relays=st.lists(
            st.builds(protocol.RelayStatus, relay=relays, load=relay_loads, age_s=floats), max_size=2
        ).map(tuple),
    ),
    st.builds(
        protocol.Helpers, reason=st.none() | names,
        relays=st.lists(
            st.builds(protocol.Helper, name=names, endpoint=endpoints, share=st.floats(0, 1)), max_size=3
        ).map(tuple),
    ),
    st.builds(
        protocol.Loaded, room=rooms, path=st.none() | names, split_page=st.none() | counts,
        hit_pages=st.none() | counts, prefill_read_bytes=counts, decode_read_bytes=counts, forwarded_bytes=counts,
        fallbacks=st.lists(names, max_size=2).map(tuple),
    ),
    st.just(protocol.Pong()),
    st.builds(
        protocol.Error, code=st.sampled_from(protocol.ErrorCode), message=names, room=st.none() | rooms,
        request_id=st.none() | names,
    ),
)  # fmt: skip


@given(requests)
def test_every_request_survives_the_wire(message):
    assert decode_request(encode(message)) == message


@given(replies)
def test_every_reply_survives_the_wire(message):
    assert decode_reply(encode(message)) == message


def test_the_round_trips_cover_every_message_type():
    asked = get_args(protocol.Request)
    answered = get_args(protocol.Reply)
    assert {kind.__name__ for kind in asked} == {
        "Heartbeat", "RelayHeartbeat", "Place", "Report", "Done", "StatusRequest", "Ping",
    }  # fmt: skip
    assert {kind.__name__ for kind in answered} == {
        "Accepted", "Placement", "Plan", "Loaded", "Helpers", "Status", "Pong", "Error",
    }  # fmt: skip


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=8,
)


def accepted_or_refused(frame: bytes) -> None:
    try:
        message = decode_request(frame)
    except ValueError as refused:
        assert str(refused)
        encode(protocol.Error(code=protocol.ErrorCode.MALFORMED, message=str(refused)))
    else:
        encode(message)


@given(st.binary(max_size=300))
def test_garbage_bytes_are_refused_with_a_reason(frame):
    accepted_or_refused(frame)


@given(requests, st.data())
def test_a_message_with_one_wrong_field_is_accepted_or_refused_with_a_reason(message, data):
    fields = json.loads(encode(message))
    name = data.draw(st.sampled_from(sorted(fields)) | st.text(max_size=8))
    fields[name] = data.draw(json_values)
    accepted_or_refused(json.dumps(fields).encode())


@given(requests, st.data())
def test_a_message_with_flipped_bytes_is_accepted_or_refused_with_a_reason(message, data):
    frame = bytearray(encode(message))
    for position in data.draw(st.lists(st.integers(0, len(frame) - 1), min_size=1, max_size=4)):
        frame[position] = data.draw(st.integers(0, 255))
    accepted_or_refused(bytes(frame))


@given(requests, st.floats(0, 100))
def test_any_valid_message_in_any_state_gets_an_answer(message, now_s):
    state = cluster()
    state.handle(prefill_report(1, 0, 10), 0.0)
    result = state.handle(message, now_s)
    if result.reply is not None:
        assert decode_reply(encode(result.reply)) == result.reply


def test_a_refusal_names_field_value_and_problem():
    frame = encode(prefill_report(1, 0, 10)).replace(b'"room":1', b'"room":-5')
    with pytest.raises(ValueError, match=r"room: .*>= 0, got '-5'"):
        decode_request(frame)


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (b'{"type":"report","room":-5}and then no JSON', "room: .*got"),
        (b'{"type":"report","room":' + b"9" * 5000 + b"}", "room: .*out of range"),
        (b'{"type":"place","request_id":"r","prompt_tokens":1.5}', "prompt_tokens: .*got '1.5'"),
        (b'{"type":"heartbeat","load":{"read_rate_bytes_per_s":1e999}}', "load.read_rate_bytes_per_s: "),
        (b'{"type":"place","request_id":"\xff"}', "message: .*utf-8"),
        (b"[" * MAX_MESSAGE_BYTES, "message: "),
        (b"", "message: "),
    ],
)
def test_what_is_wrong_is_said_also_when_the_rest_cannot_be_read(frame, words):
    with pytest.raises(ValueError, match=words) as refusal:
        decode_request(frame)
    assert len(str(refusal.value)) < 1000


def test_an_oversized_message_is_refused_unread():
    with pytest.raises(ValueError, match="exceeds"):
        decode_request(b" " * (MAX_MESSAGE_BYTES + 1))


def test_backward_ranges_are_refused():
    with pytest.raises(ValueError, match="end_page 3 is before first_page 5"):
        protocol.LaneRecord(lane="store", first_page=5, end_page=3, bytes=0, queue_s=0, busy_s=0)
