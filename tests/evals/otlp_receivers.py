"""Receivers of OTLP that are none of ours: the published gRPC service, and the published HTTP form.

`otlp_receiver.pem` holds a key and a certificate for 127.0.0.1, made for these tests only, valid for a century.
"""

from __future__ import annotations

import gzip
import http.server
import ssl
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

CERTIFICATE = Path(__file__).with_name("otlp_receiver.pem")
LONG_S = 60


class Received:
    """What has come, with the headers of each request."""

    def __init__(self) -> None:
        self.address = ""
        """HOST:PORT."""
        self.answer: int | grpc.StatusCode | None = None
        """Instead of taking a request: an HTTP status, or one of gRPC."""
        self._requests: SimpleQueue = SimpleQueue()
        self.spans: dict[str, object] = {}
        """By name."""
        self.headers: Mapping[str, str] = {}

    def take(self, request, headers: Mapping[str, str]) -> None:
        self._requests.put((request, headers))

    def until(self, *names: str) -> dict[str, object]:
        """All spans so far, as soon as these are among them."""
        while not self.spans.keys() >= set(names):
            request, self.headers = self._requests.get(timeout=LONG_S)
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    self.spans |= {span.name: span for span in scope.spans}
        return self.spans


@contextmanager
def grpc_receiver(tls: bool = False, port: int = 0) -> Iterator[Received]:
    received = Received()

    class Service(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request, context):
            if received.answer is not None:
                context.abort(received.answer, "not here")
            received.take(request, dict(context.invocation_metadata()))
            return trace_service_pb2.ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(max_workers=2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Service(), server)
    here = f"127.0.0.1:{port}"
    if tls:
        pem = CERTIFICATE.read_bytes()
        bound = server.add_secure_port(here, grpc.ssl_server_credentials([(pem, pem)]))
    else:
        bound = server.add_insecure_port(here)
    received.address = f"127.0.0.1:{bound}"
    server.start()
    try:
        yield received
    finally:
        server.stop(grace=None).wait()


@contextmanager
def http_receiver(tls: bool = False) -> Iterator[Received]:
    received = Received()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if received.answer is not None or self.path != "/v1/traces":
                self.send_error(received.answer or 404)
                return
            if self.headers["Content-Encoding"] == "gzip":
                body = gzip.decompress(body)
            request = trace_service_pb2.ExportTraceServiceRequest.FromString(body)
            received.take(request, {name.lower(): value for name, value in self.headers.items()})
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATE)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    received.address = f"127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield received
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
