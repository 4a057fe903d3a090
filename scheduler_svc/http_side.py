"""HTTP beside ZeroMQ: `/metrics` for Prometheus, `/healthz` for whoever restarts what hangs, `/place` for gateways.

Threads of their own answer; but for metrics they ask the scheduler's loop first.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from http import HTTPStatus
from socketserver import ThreadingMixIn
from typing import Any, Protocol
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from scheduler_svc import http_place
from scheduler_svc.wire.addresses import is_ipv6
from scheduler_svc.wire.protocol import Error, Place, Placement

StartResponse = Callable[..., Any]


class Asked(Protocol):
    """The scheduler's loop, from another thread."""

    def answers(self) -> bool:
        """Whether it goes round; may wait."""

    def place(self, place: Place) -> Placement | Error:
        """Raises TimeoutError."""


def serve(registry: CollectorRegistry, loop: Asked, port: int, host: str, *, may_place: bool = False) -> int:
    """Answer on `host:port` while the process lives; returns the port (useful with 0).

    `/healthz` is 200 while the loop answers, else 503; `/place` needs `may_place`; every other path is the
    scrape.  Raises OSError when it cannot listen there.
    """
    metrics = make_wsgi_app(registry)

    def answer(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        match environ["PATH_INFO"]:
            case "/healthz":
                return _health(loop, start_response)
            case http_place.PLACE_PATH:
                return _place(loop if may_place else None, environ, start_response)
        body: Iterable[bytes] = metrics(environ, start_response)
        return body

    kind = _HttpOverIPv6 if is_ipv6(host) else _Http
    server = kind((host, port), _Silent)
    server.set_app(answer)
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    return int(server.server_port)


def _health(loop: Asked, start_response: StartResponse) -> list[bytes]:
    works = loop.answers()
    status = HTTPStatus.OK if works else HTTPStatus.SERVICE_UNAVAILABLE
    start_response(_line(status), [("Content-Type", "text/plain")])
    return [b"ok\n" if works else b"the scheduler's loop does not answer\n"]


def _place(loop: Asked | None, environ: dict[str, Any], start_response: StartResponse) -> list[bytes]:
    headers = [("Content-Type", "application/json")]
    if loop is None:
        found = http_place.failed(HTTPStatus.NOT_FOUND, "start the scheduler with --place-over-http")
    elif environ["REQUEST_METHOD"] != "POST":
        found = http_place.failed(HTTPStatus.METHOD_NOT_ALLOWED, "POST a JSON object with prompt_tokens")
        headers.append(("Allow", "POST"))
    else:
        length = int(environ.get("CONTENT_LENGTH") or 0)
        body = environ["wsgi.input"].read(min(length, http_place.MOST_BYTES + 1))
        found = http_place.answer(body, loop.place)
    if found.status is HTTPStatus.SERVICE_UNAVAILABLE:
        headers.append(("Retry-After", str(http_place.RETRY_AFTER_S)))
    start_response(_line(found.status), headers)
    return [found.body]


def _line(status: HTTPStatus) -> str:
    return f"{status.value} {status.phrase}"


class _Http(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _HttpOverIPv6(_Http):
    address_family = socket.AF_INET6


class _Silent(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """A scrape a second would fill the log."""
