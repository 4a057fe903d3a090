"""A real OTLP/gRPC endpoint that keeps the spans it receives."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.address = ""
        self._spans: queue.Queue = queue.Queue()

    def Export(self, request, context):
        for resource in request.resource_spans:
            service = {item.key: item.value.string_value for item in resource.resource.attributes}[
                "service.name"
            ]
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self._spans.put((service, span))
        return trace_service_pb2.ExportTraceServiceResponse()

    def next_span(self):
        """`(service name, span)`; fails the test when none comes."""
        return self._spans.get(timeout=30)


@contextmanager
def collector() -> Iterator[Collector]:
    server = grpc.server(ThreadPoolExecutor(max_workers=2))
    made = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(made, server)
    made.address = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield made
    finally:
        server.stop(grace=None)


def attributes(span) -> dict[str, str | int]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}
