"""A small OTLP trace receiver that keeps what it gets.

`python -m dualpath_sgl.launch.processes.collector --port N --out FILE [--host ADDRESS] [--forward HOST:PORT]` listens for
OTLP over gRPC (on loopback, unless `--host` says otherwise) and appends every export request to FILE
as one line of OTLP JSON.  With `--forward` each request is also sent on to another OTLP endpoint (a
Jaeger, say); that happens on a thread of its own and may fail or lag without holding anyone up.
SIGTERM and SIGINT end it, everything received written.

Specification of the form: opentelemetry-proto, "OTLP/JSON": proto3 JSON, but ids in hex and enums
as numbers.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import queue
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import grpc
from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    TraceServiceStub,
    add_TraceServiceServicer_to_server,
)

from scheduler_svc.wire.addresses import authority

MAX_REQUEST_BYTES = 64 * 1024 * 1024
FORWARD_QUEUE_REQUESTS = 256
"""Requests waiting to be sent on; more are dropped and counted."""
FORWARD_TIMEOUT_S = 5.0
STOP_GRACE_S = 2.0
LEAST_PRIORITY = 19
"""Niceness: spans wait, and what they tell of is not slowed down by their being written."""
_ID_FIELDS = ("traceId", "spanId", "parentSpanId")


def otlp_json(request: ExportTraceServiceRequest) -> dict[str, Any]:
    """The request as an OTLP JSON object."""
    document = MessageToDict(request, use_integers_for_enums=True)
    for resource in document.get("resourceSpans", ()):
        for scope in resource.get("scopeSpans", ()):
            for span in scope.get("spans", ()):
                _ids_to_hex(span)
                for link in span.get("links", ()):
                    _ids_to_hex(link)
    return document


def _ids_to_hex(holder: dict[str, Any]) -> None:
    for field in _ID_FIELDS:
        if field in holder:
            holder[field] = base64.b64decode(holder[field]).hex()


class Forwarder:
    """Sends requests to another OTLP endpoint, in order, on its own thread."""

    def __init__(self, endpoint: str):
        self._endpoint = endpoint
        self._channel = grpc.insecure_channel(endpoint)
        self._export = TraceServiceStub(self._channel).Export
        self._waiting: queue.Queue[ExportTraceServiceRequest | None] = queue.Queue(FORWARD_QUEUE_REQUESTS)
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="forward", daemon=True)
        self._thread.start()

    def offer(self, request: ExportTraceServiceRequest) -> None:
        """Queue the request; when the queue is full it is dropped.  Never blocks."""
        try:
            self._waiting.put_nowait(request)
        except queue.Full:
            self._report(f"{FORWARD_QUEUE_REQUESTS} requests are waiting, dropping")

    def close(self) -> None:
        """Send what waits, for at most STOP_GRACE_S seconds."""
        try:
            self._waiting.put(None, timeout=STOP_GRACE_S)
        except queue.Full:
            return
        self._thread.join(STOP_GRACE_S)
        self._channel.close()

    def _run(self) -> None:
        while (request := self._waiting.get()) is not None:
            try:
                self._export(request, timeout=FORWARD_TIMEOUT_S)
                self._failing = False
            except grpc.RpcError as error:
                self._report(f"{error.code().name}: {error.details()}")

    def _report(self, problem: str) -> None:
        # Once per outage: an endpoint that is away must not fill the log.
        if not self._failing:
            print(f"collector: cannot forward to {self._endpoint}: {problem}", file=sys.stderr, flush=True)
        self._failing = True


class Collector(TraceServiceServicer):
    """Writes each export request to `out` as one line."""

    def __init__(self, out: TextIO, forwarder: Forwarder | None):
        self._out = out
        self._forwarder = forwarder
        self._writing = threading.Lock()

    def Export(self, request: ExportTraceServiceRequest, context: grpc.ServicerContext):
        line = json.dumps(otlp_json(request), separators=(",", ":"))
        with self._writing:
            self._out.write(line + "\n")
            self._out.flush()
        if self._forwarder:
            self._forwarder.offer(request)
        return ExportTraceServiceResponse()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dualpath_sgl.launch.processes.collector", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--port", type=int, required=True, help="gRPC port; 0 takes a free one")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--out", type=Path, required=True, help="file that OTLP JSON lines are appended to")
    parser.add_argument("--forward", metavar="HOST:PORT", help="another OTLP gRPC endpoint")
    options = parser.parse_args(arguments)

    os.nice(LEAST_PRIORITY)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())

    options.out.parent.mkdir(parents=True, exist_ok=True)
    forwarder = Forwarder(options.forward) if options.forward else None
    with options.out.open("a", encoding="utf-8") as out:
        server = grpc.server(
            ThreadPoolExecutor(max_workers=4),
            # gRPC lets servers share a port unless told otherwise; each would get some of the spans.
            options=[("grpc.max_receive_message_length", MAX_REQUEST_BYTES), ("grpc.so_reuseport", 0)],
        )
        add_TraceServiceServicer_to_server(Collector(out, forwarder), server)
        try:
            port = server.add_insecure_port(authority(options.host, options.port))
        except RuntimeError:
            parser.exit(
                1, f"collector: port {options.port} on {options.host} is taken; choose another --port\n"
            )
        server.start()
        print(f"collector ready on {options.host}:{port}, writing {options.out}", flush=True)
        stop.wait()
        server.stop(STOP_GRACE_S).wait()
    if forwarder:
        forwarder.close()


if __name__ == "__main__":
    main()
