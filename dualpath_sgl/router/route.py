"""One client request from its first byte to its last.

place -> both halves -> first chunk -> the rest
             |-> refused: another pair, as long as nothing was streamed
             |-> failed: 502 at once
"""

from __future__ import annotations

import asyncio
import logging

import aiohttp
from aiohttp import web
from opentelemetry.trace import Span

from dualpath_sgl.router.exchange import Exchange
from dualpath_sgl.router.fleet.body import Bodies
from dualpath_sgl.router.fleet.engines import Engine
from dualpath_sgl.router.fleet.errors import (
    BadRequest,
    EngineAnswered,
    EngineRefused,
    NoEngine,
    RouteError,
    TimeLimit,
)
from dualpath_sgl.router.limit import RequestLimit
from dualpath_sgl.router.metrics import RouterMetrics
from dualpath_sgl.router.pairing import Pairing, attributes_of
from dualpath_sgl.router.reply import Reply
from dualpath_sgl.router.request import ClientRequest
from dualpath_sgl.router.spans import RouterSpans, failed
from scheduler_svc.telemetry.log_limit import LimitedLog
from scheduler_svc.telemetry.tracing import exported_trace, traceparent_of

logger = logging.getLogger(__name__)


class Route:
    def __init__(
        self,
        http: aiohttp.ClientSession,
        pairing: Pairing,
        spans: RouterSpans,
        metrics: RouterMetrics,
        limit: RequestLimit,
        bodies: Bodies,
        *,
        request_timeout_s: float,
        max_retries: int,
    ) -> None:
        self._http = http
        self._pairing = pairing
        self._spans = spans
        self._metrics = metrics
        self._limit = limit
        self._bodies = bodies
        self._request_timeout_s = request_timeout_s
        self._max_retries = max_retries
        self._log = LimitedLog(logger)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Cancelled when the client disconnects, which ends both halves."""
        reply = Reply(request)
        attributes = {"http.request.method": request.method, "http.route": request.path}
        with (
            self._metrics.request(reply),
            self._spans.route(request.headers.get("traceparent"), attributes) as span,
        ):
            reply.trace_id = exported_trace(traceparent_of(span))
            try:
                self._limit.check()
                async with (
                    asyncio.timeout(self._request_timeout_s),
                    self._bodies.body(request) as body,
                    self._limit.place(),
                ):
                    response = await self._answer(request, body, reply, span)
            except TimeoutError:
                response = await self._fail(reply, span, TimeLimit(self._request_timeout_s))
            except RouteError as error:
                response = await self._fail(reply, span, error)
            except (asyncio.CancelledError, ConnectionError):
                if not reply.ended:
                    span.set_attribute("dualpath.client.disconnected", True)
                raise
            finally:
                if reply.status is not None:
                    span.set_attribute("http.response.status_code", reply.status)
            return response

    async def _fail(self, reply: Reply, span: Span, error: RouteError) -> web.StreamResponse:
        self._log.log(logging.WARNING, f"%d {error.kind}: %s", error.status, error)
        failed(span, str(error))
        return await reply.fail(error)

    async def _answer(
        self, http_request: web.Request, body: bytes, reply: Reply, span: Span
    ) -> web.StreamResponse:
        request = ClientRequest(
            http_request.path,
            http_request.headers,
            body,
            http_request.rel_url.raw_query_string,
        )
        reply.streams = request.streams
        span.set_attributes(
            {"dualpath.prompt.tokens": request.prompt_tokens, "dualpath.stream": request.streams}
            | ({"dualpath.session": request.session_id} if request.session_id else {})
        )
        pair = await self._pairing.first(request, span)
        refusals: dict[Engine, str] = {}
        while True:
            span.set_attributes(attributes_of(pair) | {"dualpath.attempts": len(refusals) + 1})
            if request.samples > 1 and not pair.runs_dualpath:
                raise BadRequest(
                    f"n is {request.samples}: only engines with DualPath answer that, and the scheduler has "
                    "named this pair not yet; try again later, or send the request once for each answer"
                )
            try:
                async with Exchange(self._http, self._spans, span, request, pair) as exchange:
                    response = await self._relay(exchange, request, reply, span)
                span.set_attributes(self._pairing.outcome(pair))
                return response
            except EngineAnswered as answer:
                return await reply.whole(answer.status, answer.headers, answer.content)
            except EngineRefused as refused:
                logger.info("room %d: %s", pair.room, refused)
                refusals[refused.engine] = refused.problem
                refused_by = refused.engine.role
            if len(refusals) > self._max_retries:
                raise NoEngine(f"{'; '.join(refusals.values())}; try again later")
            pair = self._pairing.again(pair, refusals)
            self._metrics.retried(refused_by)

    async def _relay(
        self, exchange: Exchange, request: ClientRequest, reply: Reply, span: Span
    ) -> web.StreamResponse:
        beginning = await exchange.first()
        span.add_event("first_chunk")
        if request.streams:
            response = await reply.begin(beginning.headers)
            await reply.write(beginning.content)
            async for chunk in exchange.rest():
                await reply.write(chunk)
            await reply.end()
        else:
            response = await reply.whole(200, beginning.headers, beginning.content)
        return response
