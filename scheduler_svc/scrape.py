"""HTTP beside ZeroMQ: `/metrics` for Prometheus, `/healthz` for whoever restarts what hangs.

Threads of their own answer; of `/healthz` they ask the scheduler's loop first.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from http import HTTPStatus
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from scheduler_svc.wire.addresses import is_ipv6

HEALTH_PATH = "/healthz"


def serve(registry: CollectorRegistry, healthy: Callable[[], bool], port: int, host: str) -> int:
    """Answer on `host:port` while the process lives; returns the port (useful with 0).

    `/healthz` is 200 while `healthy()`, which may wait, else 503; every other path is the scrape.
    Raises OSError when it cannot listen there.
    """
    metrics = make_wsgi_app(registry)

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] != HEALTH_PATH:
            body: Iterable[bytes] = metrics(environ, start_response)
            return body
        works = healthy()
        status = HTTPStatus.OK if works else HTTPStatus.SERVICE_UNAVAILABLE
        start_response(f"{status.value} {status.phrase}", [("Content-Type", "text/plain")])
        return [b"ok\n" if works else b"the scheduler's loop does not answer\n"]

    kind = _HttpOverIPv6 if is_ipv6(host) else _Http
    server = kind((host, port), _Silent)
    server.set_app(answer)
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    return int(server.server_port)


class _Http(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _HttpOverIPv6(_Http):
    address_family = socket.AF_INET6


class _Silent(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """A scrape a second would fill the log."""
