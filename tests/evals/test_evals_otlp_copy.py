"""Copies of spans reach receivers that are none of ours, or are counted as lost."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from otlp_receivers import CERTIFICATE, grpc_receiver, http_receiver

from dualpath_sgl.launch.config.otlp import parsed
from dualpath_sgl.launch.processes import otlp_copy
from dualpath_sgl.launch.processes.otlp_copy import OtlpCopy, sender

HEADERS = {"x-token": "secret"}


def request(*names: str) -> ExportTraceServiceRequest:
    made = ExportTraceServiceRequest()
    scope = made.resource_spans.add().scope_spans.add()
    for number, name in enumerate(names):
        span = scope.spans.add(name=name, trace_id=bytes(15) + b"\1", span_id=bytes([1 + number] * 8))
        span.start_time_unix_nano, span.end_time_unix_nano = 1_000, 2_000
    return made


def until_it_fails(copy: OtlpCopy) -> None:
    deadline_s = time.monotonic() + 60
    while not copy._failing:
        assert time.monotonic() < deadline_s, "it has not met the receiver"
        time.sleep(0.005)


def copy_to(endpoint: str, ca_file: Path | None = None) -> OtlpCopy:
    return OtlpCopy(endpoint, *sender(parsed(endpoint), HEADERS, ca_file))


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("over", ["grpc", "http"])
def test_spans_reach_an_independent_receiver_whole_and_with_the_headers(over, tls):
    receiver = (grpc_receiver if over == "grpc" else http_receiver)(tls)
    with receiver as received:
        copy = copy_to(f"{over}{'s' * tls}://{received.address}", CERTIFICATE if tls else None)
        sent = request("first", "second")
        copy.offer(sent)
        spans = received.until("first", "second")
        copy.close()
    assert list(spans.values()) == list(sent.resource_spans[0].scope_spans[0].spans)
    assert received.headers["x-token"] == "secret"


@pytest.mark.parametrize("over", ["grpc", "http"])
def test_a_receiver_whose_certificate_is_not_trusted_gets_nothing(over, capsys):
    with (grpc_receiver if over == "grpc" else http_receiver)(tls=True) as received:
        send, let_go = sender(parsed(f"{over}s://{received.address}"), {}, None)
        with pytest.raises(otlp_copy.NotNow):
            send(request("secret"))
        let_go()
    assert received._requests.empty()


@pytest.mark.parametrize(("over", "later"), [("grpc", grpc.StatusCode.UNAVAILABLE), ("http", 503)])
def test_a_receiver_that_comes_back_gets_what_waited_and_its_outage_is_said_once(
    over, later, capsys, monkeypatch
):
    monkeypatch.setattr(otlp_copy, "RETRY_S", 0.01)
    with (grpc_receiver if over == "grpc" else http_receiver)() as received:
        received.answer = later
        copy = copy_to(f"{over}://{received.address}")
        copy.offer(request("early"))
        until_it_fails(copy)
        copy.offer(request("late"))
        received.answer = None
        received.until("early", "late")
        copy.close()
    assert capsys.readouterr().err.count("cannot be reached") == 1


@pytest.mark.parametrize(("over", "never"), [("grpc", grpc.StatusCode.UNAUTHENTICATED), ("http", 401)])
def test_what_a_receiver_refuses_is_counted_and_not_tried_again(over, never, capsys):
    with (grpc_receiver if over == "grpc" else http_receiver)() as received:
        received.answer = never
        copy = copy_to(f"{over}://{received.address}")
        copy.offer(request("one", "two"))
        until_it_fails(copy)
        copy.offer(request("three"))
        copy.close()
    told = capsys.readouterr().err
    assert told.count("cannot be reached") == 1 and "3 spans were not sent" in told


def test_a_receiver_that_is_away_costs_nobody_anything_and_its_losses_are_counted(capsys, monkeypatch):
    monkeypatch.setattr(otlp_copy, "MOST_WAITING_SPANS", 4)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    copy = copy_to(f"127.0.0.1:{port}")
    for number in range(10):
        copy.offer(request(str(number)))
    copy.close()
    assert "10 spans were not sent" in capsys.readouterr().err


def test_a_receiver_that_never_answers_holds_up_no_end(capsys, monkeypatch):
    monkeypatch.setattr(otlp_copy, "STOP_GRACE_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        copy = copy_to(f"127.0.0.1:{silent.getsockname()[1]}")
        copy.offer(request("into the void"))
        copy.close()
        copy._thread.join(30)
    assert not copy._thread.is_alive()
    told = capsys.readouterr().err
    assert "1 spans were not sent" in told and "Traceback" not in told


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("jaeger:4317", "grpc jaeger:4317"),
        ("grpcs://[::1]:443", "grpc tls [::1]:443"),
        ("http://jaeger:4318", "http://jaeger:4318/v1/traces"),
        ("https://tempo.example:443/otlp/v1/traces", "https://tempo.example:443/otlp/v1/traces"),
    ],
)
def test_an_endpoint_says_its_protocol(endpoint, url):
    found = parsed(endpoint)
    shown = f"grpc {'tls ' * found.tls}{found.target}" if found.grpc else found.url
    assert shown == url


@pytest.mark.parametrize(
    ("endpoint", "remedy"),
    [
        ("jaeger", "a host and a port"),
        ("4317", "a host and a port"),
        ("jaeger:0", "a host and a port"),
        ("http://jaeger", "a host and a port"),
        ("jaeger:4318", "write http:// before it"),
        ("grpcs://jaeger:4318", "write http:// before it"),
        ("http://jaeger:4317", "leave http:// away"),
        ("jaeger:16686", "Jaeger's pages"),
        ("http://jaeger:16686", "Jaeger's pages"),
        ("jaeger:4317/v1/traces", "no path"),
        ("tcp://jaeger:4317", "give HOST:PORT"),
        ("http://user:word@jaeger:4318", "give HOST:PORT"),
        ("http://jaeger:4318?token=1", "give HOST:PORT"),
        ("::1:4317", "a host and a port"),
    ],
)
def test_a_mistaken_endpoint_is_refused_with_the_remedy(endpoint, remedy):
    with pytest.raises(ValueError, match=remedy):
        parsed(endpoint)
