"""Prometheus metrics of the router, served at `/metrics`.

Everything is added on the event loop, which also answers the scrapes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus

from aiohttp import web
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.exposition import choose_encoder

from dualpath_sgl.router.reply import Reply
from scheduler_svc.telemetry import build
from scheduler_svc.telemetry.tally import CounterTally, HistogramTally
from scheduler_svc.wire.protocol import Role

REQUEST_BUCKETS_S = (
    *(0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0),
)
SCHEDULER_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
NO_STATUS = "none"
"""The client got no answer."""
NO_ERROR = "none"
"""Also of an engine's own answer with status 4xx."""
DISCONNECTED = "disconnected"
"""The client left before it had everything."""
INTERNAL = "internal"
"""A fault of the router."""
STREAMS = [("false",), ("true",)]
ROLES = [(role.value,) for role in Role]


class RouterMetrics:
    """One registry per router, so that several can live in one process."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        build.tell(registry, "router")
        self._in_flight = Gauge(
            "dualpath_router_requests_in_flight", "Requests being answered.", registry=registry
        )
        self._requests = CounterTally(
            registry,
            "dualpath_router_requests",
            "Requests ended, by the status class the client got and what went wrong.",
            ["status", "error"],
            [("2xx", NO_ERROR), ("4xx", NO_ERROR), ("5xx", INTERNAL), (NO_STATUS, DISCONNECTED)],
        )
        self._request_seconds = HistogramTally(
            registry,
            "dualpath_router_request_seconds",
            "From a request's arrival to the end of its answer.",
            REQUEST_BUCKETS_S,
            ["stream"],
            STREAMS,
        )
        self._first_byte_seconds = HistogramTally(
            registry,
            "dualpath_router_first_byte_seconds",
            "From a request's arrival to the first byte of a good answer.",
            REQUEST_BUCKETS_S,
            ["stream"],
            STREAMS,
        )
        self._placements = CounterTally(
            registry,
            "dualpath_router_placements",
            "Requests given a pair of engines, by who chose it; retries not included.",
            ["placed_by"],
            [("scheduler",), ("router",)],
        )
        self._not_admitted = CounterTally(
            registry,
            "dualpath_router_engines_not_admitted",
            "Placements that named an engine which the router's options do not admit, by its role.",
            ["role"],
            ROLES,
        )
        self._retries = CounterTally(
            registry,
            "dualpath_router_retries",
            "Attempts on another pair, by the role of the engine that refused.",
            ["refused_by"],
            ROLES,
        )
        self._scheduler_seconds = HistogramTally(
            registry,
            "dualpath_router_scheduler_seconds",
            "From the question to the scheduler to its placement.",
            SCHEDULER_BUCKETS_S,
        )

    async def scrape(self, request: web.Request) -> web.Response:
        """In the form that is asked for: exemplars need OpenMetrics."""
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(self._registry), headers={"Content-Type": content_type})

    @contextmanager
    def request(self, reply: Reply) -> Iterator[None]:
        """One client request, from its arrival to its end."""
        arrived_s = time.monotonic()
        self._in_flight.inc()
        unfinished = INTERNAL
        try:
            yield
        except (asyncio.CancelledError, ConnectionError):
            unfinished = DISCONNECTED
            raise
        finally:
            self._in_flight.dec()
            error = reply.error or (NO_ERROR if reply.ended else unfinished)
            self._requests.add(1, NO_STATUS if reply.status is None else f"{reply.status // 100}xx", error)
            stream = "true" if reply.streams else "false"
            ended_s = time.monotonic() if reply.ended_s is None else reply.ended_s
            self._request_seconds.observe(ended_s - arrived_s, stream, trace_id=reply.trace_id)
            if reply.status == HTTPStatus.OK and reply.begun_s is not None:
                self._first_byte_seconds.observe(reply.begun_s - arrived_s, stream, trace_id=reply.trace_id)

    @contextmanager
    def scheduler_asked(self) -> Iterator[None]:
        """A question to the scheduler; without an answer it is not counted."""
        asked_s = time.monotonic()
        yield
        self._scheduler_seconds.observe(time.monotonic() - asked_s)

    def placed(self, placed_by: str) -> None:
        """`placed_by`: one of `pairing.PlacedBy`."""
        self._placements.add(1, placed_by)

    def not_admitted(self, role: Role) -> None:
        self._not_admitted.add(1, role.value)

    def retried(self, refused_by: Role) -> None:
        self._retries.add(1, refused_by.value)
