"""A small OTLP trace receiver that keeps what it gets.

`python -m dualpath_sgl.launch.processes.collector --port N --out FILE [--host ADDRESS] [--forward ENDPOINT]` listens for
OTLP over gRPC (on loopback, unless `--host` says otherwise) and appends every export request to FILE
as one line of OTLP JSON.  With `--forward` a copy goes to another OTLP endpoint (otlp_copy.py), with the headers
that the variable DUALPATH_COLLECTOR_HEADERS holds as a JSON object: a command line is no place for a token.
SIGTERM and SIGINT end it, everything received written.

Specification of the form: opentelemetry-proto, "OTLP/JSON": proto3 JSON, but ids in hex and enums
as numbers.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import signal
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
    add_TraceServiceServicer_to_server,
)

from dualpath_sgl.launch.config.otlp import HEADERS_VARIABLE, OtlpEndpoint, parsed
from dualpath_sgl.launch.processes.otlp_copy import OtlpCopy, sender
from scheduler_svc.wire.addresses import authority

MAX_REQUEST_BYTES = 64 * 1024 * 1024
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


class Collector(TraceServiceServicer):
    """Writes each export request to `out` as one line."""

    def __init__(self, out: TextIO, copy: OtlpCopy | None):
        self._out = out
        self._copy = copy
        self._writing = threading.Lock()

    def Export(self, request: ExportTraceServiceRequest, context: grpc.ServicerContext):
        line = json.dumps(otlp_json(request), separators=(",", ":"))
        with self._writing:
            self._out.write(line + "\n")
            self._out.flush()
        if self._copy:
            self._copy.offer(request)
        return ExportTraceServiceResponse()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dualpath_sgl.launch.processes.collector", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--port", type=int, required=True, help="gRPC port; 0 takes a free one")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--out", type=Path, required=True, help="file that OTLP JSON lines are appended to")
    parser.add_argument("--forward", metavar="ENDPOINT", type=_endpoint, help="another OTLP endpoint")
    parser.add_argument("--forward-ca", type=Path, metavar="FILE", help="certificates to trust there")
    options = parser.parse_args(arguments)

    os.nice(LEAST_PRIORITY)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())

    options.out.parent.mkdir(parents=True, exist_ok=True)
    copy = None
    if options.forward is not None:
        headers = json.loads(os.environ.get(HEADERS_VARIABLE, "{}"))
        copy = OtlpCopy(options.forward.target, *sender(options.forward, headers, options.forward_ca))
    with options.out.open("a", encoding="utf-8") as out:
        server = grpc.server(
            ThreadPoolExecutor(max_workers=4),
            # gRPC lets servers share a port unless told otherwise; each would get some of the spans.
            options=[("grpc.max_receive_message_length", MAX_REQUEST_BYTES), ("grpc.so_reuseport", 0)],
        )
        add_TraceServiceServicer_to_server(Collector(out, copy), server)
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
    if copy:
        copy.close()


def _endpoint(text: str) -> OtlpEndpoint:
    try:
        return parsed(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


if __name__ == "__main__":
    main()
