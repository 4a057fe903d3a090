"""Sends a copy of what the collector gets to another OTLP receiver, over gRPC or HTTP, on a thread of its own.

A receiver that is away, slow or says no holds nobody up: what waits is bounded, what does not fit is counted, and each
outage has a line at its begin and one, with the number of lost spans, at its end.
"""

from __future__ import annotations

import gzip
import ssl
import sys
import threading
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import TraceServiceStub

from dualpath_sgl.launch.config.otlp import OtlpEndpoint

MOST_WAITING_SPANS = 50_000
MOST_SPANS_AT_ONCE = 2_000
"""Requests that wait are sent together up to about so many."""
TIMEOUT_S = 5.0
RETRY_S = 1.0
STOP_GRACE_S = 2.0
_LATER = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
}
_HTTP_LATER = {408, 429, 502, 503, 504}


class NotNow(Exception):
    """The receiver may take it later."""


class Refused(Exception):
    """It never will."""


Send = Callable[[ExportTraceServiceRequest], None]
"""Raises NotNow or Refused."""


def sender(
    endpoint: OtlpEndpoint, headers: Mapping[str, str], ca_file: Path | None
) -> tuple[Send, Callable[[], None]]:
    """How to send there, and how to let go of it.  Raises OSError when `ca_file` cannot be read."""
    if endpoint.grpc:
        return _grpc_sender(endpoint, headers, ca_file)
    return _http_sender(endpoint, headers, ca_file), lambda: None


def _grpc_sender(
    endpoint: OtlpEndpoint, headers: Mapping[str, str], ca_file: Path | None
) -> tuple[Send, Callable[[], None]]:
    if endpoint.tls:
        roots = ca_file.read_bytes() if ca_file is not None else None
        channel = grpc.secure_channel(endpoint.target, grpc.ssl_channel_credentials(roots))
    else:
        channel = grpc.insecure_channel(endpoint.target)
    export = TraceServiceStub(channel).Export
    metadata = [(name.lower(), value) for name, value in headers.items()]

    def send(request: ExportTraceServiceRequest) -> None:
        try:
            export(request, timeout=TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            problem = f"{error.code().name}: {error.details()}"
            if "HTTP/2" in problem or "http1" in problem:
                problem += "; does it speak OTLP/HTTP? then write http:// before it"
            raise (NotNow if error.code() in _LATER else Refused)(problem) from None

    return send, channel.close


def _http_sender(endpoint: OtlpEndpoint, headers: Mapping[str, str], ca_file: Path | None) -> Send:
    context = ssl.create_default_context(cafile=ca_file) if endpoint.tls else None
    sent = {"Content-Type": "application/x-protobuf", "Content-Encoding": "gzip", **headers}

    def send(request: ExportTraceServiceRequest) -> None:
        body = gzip.compress(request.SerializeToString(), compresslevel=1)
        post = urllib.request.Request(endpoint.url, data=body, headers=sent, method="POST")
        try:
            with urllib.request.urlopen(post, timeout=TIMEOUT_S, context=context):
                pass
        except urllib.error.HTTPError as error:
            raise (NotNow if error.code in _HTTP_LATER else Refused)(
                f"HTTP {error.code} {error.reason}"
            ) from None
        except (OSError, ValueError, urllib.error.URLError) as error:
            raise NotNow(str(getattr(error, "reason", error))) from None
        except Exception as error:  # http.client's, from what is no HTTP server
            raise NotNow(
                f"{type(error).__name__}: does it speak OTLP/gRPC? then leave http:// away"
            ) from None

    return send


class OtlpCopy:
    """`offer` never blocks."""

    def __init__(self, name: str, send: Send, let_go: Callable[[], None]) -> None:
        """`name`: of the receiver, for the log."""
        self._name = name
        self._send = send
        self._let_go = let_go
        self._waiting: deque[ExportTraceServiceRequest] = deque()
        self._waiting_spans = 0
        self._lost = 0
        """Since the last word about it."""
        self._failing = False
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="otlp copy", daemon=True)
        self._thread.start()

    def offer(self, request: ExportTraceServiceRequest) -> None:
        """To be sent soon, or counted as lost when too much waits."""
        count = spans_in(request)
        with self._changed:
            if self._waiting_spans + count > MOST_WAITING_SPANS:
                self._lost += count
                self._fails(f"{self._waiting_spans} spans wait, more are dropped")
                return
            self._waiting.append(request)
            self._waiting_spans += count
            self._changed.notify()

    def close(self) -> None:
        """Send what waits, for at most STOP_GRACE_S seconds, and say what was lost."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(STOP_GRACE_S)
        with self._changed:
            self._lost += self._waiting_spans
            self._waiting.clear()
            self._waiting_spans = 0
            self._tell_lost()
        self._let_go()

    def _run(self) -> None:
        while (request := self._next()) is not None:
            count = spans_in(request)
            try:
                self._send(request)
            except NotNow as problem:
                self._try_again(request, count, str(problem))
            except Exception as problem:
                with self._changed:
                    self._waiting_spans = max(0, self._waiting_spans - count)
                    self._lost += count
                    self._fails(str(problem))
            else:
                with self._changed:
                    self._waiting_spans = max(0, self._waiting_spans - count)
                    self._tell_lost()
                    self._failing = False

    def _next(self) -> ExportTraceServiceRequest | None:
        """What waits, together; None when nothing does and none is to come."""
        with self._changed:
            while not self._waiting:
                if self._closing:
                    return None
                self._changed.wait()
            request = self._waiting.popleft()
            while self._waiting and spans_in(request) + spans_in(self._waiting[0]) <= MOST_SPANS_AT_ONCE:
                request.resource_spans.extend(self._waiting.popleft().resource_spans)
            return request

    def _try_again(self, request: ExportTraceServiceRequest, count: int, problem: str) -> None:
        """After a while, unless it is time to end."""
        with self._changed:
            self._fails(problem)
            if not self._closing:
                self._changed.wait_for(lambda: self._closing, RETRY_S)
            if self._closing:
                self._waiting_spans = max(0, self._waiting_spans - count)
                self._lost += count
            else:
                self._waiting.appendleft(request)

    def _fails(self, problem: str) -> None:
        if not self._failing:
            self._say(f"cannot be reached: {problem}")
        self._failing = True

    def _tell_lost(self) -> None:
        if self._lost:
            self._say(f"{self._lost} spans were not sent")
        self._lost = 0

    def _say(self, text: str) -> None:
        print(f"collector: {self._name}: {text}", file=sys.stderr, flush=True)


def spans_in(request: ExportTraceServiceRequest) -> int:
    return sum(len(scope.spans) for resource in request.resource_spans for scope in resource.scope_spans)
