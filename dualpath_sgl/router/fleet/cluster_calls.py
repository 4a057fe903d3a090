"""What a client may ask besides generating: models, server info, caches, health.

Engines get the client's headers, its key among them, and its query; a call for all of them goes well only
when every one has done it.
"""

from __future__ import annotations

import asyncio
import math
from http import HTTPStatus
from typing import Any, NamedTuple

import aiohttp
import orjson
from aiohttp import web

from dualpath_sgl.router.fleet import headers
from dualpath_sgl.router.fleet.body import body_of
from dualpath_sgl.router.fleet.engines import Engine, EngineDirectory, address
from dualpath_sgl.router.fleet.errors import words_of
from scheduler_svc.wire.protocol import Role

CALL_TIMEOUT_S = 60.0
"""A flush waits for an engine's scheduler; what its own `timeout` asks for comes on top."""
CLIENT_ERRORS = range(400, 500)
_SHOWN_CHARACTERS = 500


class Refusal(NamedTuple):
    """What an engine, or the way to it, made of a call."""

    status: int
    """The engine's own where the call itself is wrong (no key, caches in use), else 502."""
    problem: str


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    """Those that the client gets."""
    content: bytes

    def json(self) -> Any:
        """None when it is no JSON."""
        try:
            return orjson.loads(self.content)
        except orjson.JSONDecodeError:
            return None

    def to_client(self) -> web.Response:
        return web.Response(status=self.status, headers=self.headers, body=self.content)


class ClusterCalls:
    def __init__(self, http: aiohttp.ClientSession, directory: EngineDirectory) -> None:
        self._http = http
        self._directory = directory

    async def alive(self, request: web.Request) -> web.Response:
        """This process answers; that says nothing of the engines."""
        return web.Response()

    async def ready(self, request: web.Request) -> web.Response:
        """Whether a request could be served, and what is known of each engine."""
        ready = all(any(engine.is_up for engine in self._directory.of(role)) for role in Role)
        engines = [
            {
                "role": engine.role,
                "url": engine.url,
                "up": engine.is_up,
                "problem": None if engine.is_up else engine.problem,
                "in_flight": engine.in_flight,
            }
            for engine in self._directory
        ]
        not_admitted = [
            {"role": role, "url": url, "placements": count}
            for (role, url), count in self._directory.refused.items()
        ]
        status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
        return web.json_response(
            {"ready": ready, "engines": engines, "not_admitted": not_admitted}, status=status
        )

    async def any_engine(self, request: web.Request) -> web.Response:
        """What every engine would answer alike."""
        able = [engine for engine in self._directory if engine.is_up]
        if not able:
            return _failed([Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "no engine is up")])
        try:
            return (await self._asked(able[0], request, await body_of(request))).to_client()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            return _failed([Refusal(HTTPStatus.BAD_GATEWAY, f"{able[0].url}: {words_of(error)}")])

    async def every_engine(self, request: web.Request) -> web.Response:
        """Done when all engines have done it; the answer is the first one's."""
        results = await self._all(list(self._directory), request)
        refusals = [result for result in results if isinstance(result, Refusal)]
        answers = [result for result in results if isinstance(result, Answer)]
        return _failed(refusals) if refusals or not answers else answers[0].to_client()

    async def server_info(self, request: web.Request) -> web.Response:
        """In the form that SGLang's benchmarks read (`internal_states` are the DEs')."""
        engines = list(self._directory)
        results = await self._all(engines, request)
        if refusals := [result for result in results if isinstance(result, Refusal)]:
            return _failed(refusals)
        by_role: dict[Role, list[Any]] = {role: [] for role in Role}
        for engine, found in zip(engines, results, strict=True):
            by_role[engine.role].append(found.json() if isinstance(found, Answer) else None)
        states = [
            state
            for found in by_role[Role.DECODE]
            if isinstance(found, dict)
            for state in found.get("internal_states", ())
        ]
        return web.json_response(
            {
                "internal_states": states,
                "prefill": by_role[Role.PREFILL],
                "decode": by_role[Role.DECODE],
            }
        )

    async def _all(self, engines: list[Engine], request: web.Request) -> list[Answer | Refusal]:
        content = await body_of(request)
        return await asyncio.gather(*(self._done(engine, request, content) for engine in engines))

    async def _done(self, engine: Engine, request: web.Request, content: bytes) -> Answer | Refusal:
        try:
            answer = await self._asked(engine, request, content)
        except TimeoutError:
            problem = f"{engine.url} does not answer within {_limit_s(request):g} s"
            return Refusal(HTTPStatus.BAD_GATEWAY, problem)
        except (aiohttp.ClientError, OSError) as error:
            return Refusal(HTTPStatus.BAD_GATEWAY, f"{engine.url}: {words_of(error)}")
        if answer.status == HTTPStatus.OK:
            return answer
        said = answer.content.decode(errors="replace")[:_SHOWN_CHARACTERS].strip()
        status = answer.status if answer.status in CLIENT_ERRORS else HTTPStatus.BAD_GATEWAY
        return Refusal(status, f"{engine.url} answers {answer.status}: {said}")

    async def _asked(self, engine: Engine, request: web.Request, content: bytes) -> Answer:
        kept = headers.forwarded(request.headers)
        if content:
            kept["Content-Type"] = request.headers.get("Content-Type", "application/json")
        async with self._http.request(
            request.method,
            address(engine, request.rel_url.raw_path, request.rel_url.raw_query_string),
            data=content or None,
            headers=kept,
            timeout=aiohttp.ClientTimeout(total=_limit_s(request)),
            allow_redirects=False,
        ) as answer:
            return Answer(answer.status, headers.to_client(answer.headers), await answer.read())


def _limit_s(request: web.Request) -> float:
    try:
        asked_s = float(request.query.get("timeout", 0))
    except ValueError:
        asked_s = 0.0
    return CALL_TIMEOUT_S + (max(0.0, asked_s) if math.isfinite(asked_s) else 0.0)


def _failed(refusals: list[Refusal]) -> web.Response:
    """An engine that failed says more than one that wants another call."""
    status = max(refusal.status for refusal in refusals)
    kind = "engine_failed" if status == HTTPStatus.BAD_GATEWAY else "engine_refused"
    message = "; ".join(refusal.problem for refusal in refusals)
    return web.json_response({"error": {"message": message, "type": kind, "code": status}}, status=status)
