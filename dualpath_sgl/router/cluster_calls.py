"""What a client may ask besides generating: models, server info, caches, health."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

import aiohttp
from aiohttp import web

from dualpath_sgl.router import headers
from dualpath_sgl.router.engines import Engine, EngineDirectory
from dualpath_sgl.router.errors import words_of
from scheduler_svc.protocol import Role

CALL_TIMEOUT_S = 60.0
"""A flush waits for an engine's scheduler."""


class ClusterCalls:
    def __init__(self, http: aiohttp.ClientSession, directory: EngineDirectory) -> None:
        self._http = http
        self._directory = directory
        self._timeout = aiohttp.ClientTimeout(total=CALL_TIMEOUT_S)

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
        status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
        return web.json_response({"ready": ready, "engines": engines}, status=status)

    async def any_engine(self, request: web.Request) -> web.Response:
        """What every engine would answer alike."""
        able = [engine for engine in self._directory if engine.is_up]
        if not able:
            return web.Response(status=HTTPStatus.SERVICE_UNAVAILABLE, text="no engine is up")
        try:
            async with self._http.get(able[0].url + request.path, timeout=self._timeout) as answer:
                return web.Response(
                    status=answer.status,
                    headers=headers.to_client(answer.headers),
                    body=await answer.read(),
                )
        except (aiohttp.ClientError, OSError) as error:
            return _bad_gateway([f"{able[0].url}: {words_of(error)}"])

    async def every_engine(self, request: web.Request) -> web.Response:
        """Done when all engines have done it."""
        results = await asyncio.gather(*(self._ask(engine, request) for engine in self._directory))
        problems = [problem for problem, _ in results if problem is not None]
        return _bad_gateway(problems) if problems else web.Response()

    async def server_info(self, request: web.Request) -> web.Response:
        """In the form that SGLang's benchmarks read (`internal_states` are the DEs')."""
        engines = list(self._directory)
        results = await asyncio.gather(*(self._ask(engine, request) for engine in engines))
        problems = [problem for problem, _ in results if problem is not None]
        if problems:
            return _bad_gateway(problems)
        by_role: dict[Role, list[dict[str, Any]]] = {role: [] for role in Role}
        for engine, (_, found) in zip(engines, results, strict=True):
            by_role[engine.role].append(found)
        states = [state for found in by_role[Role.DECODE] for state in found.get("internal_states", ())]
        return web.json_response(
            {
                "internal_states": states,
                "prefill": by_role[Role.PREFILL],
                "decode": by_role[Role.DECODE],
            }
        )

    async def _ask(self, engine: Engine, request: web.Request) -> tuple[str | None, Any]:
        """What is wrong, or None and the JSON answered (None when it is no JSON)."""
        try:
            async with self._http.request(
                request.method, engine.url + request.path, timeout=self._timeout
            ) as answer:
                if answer.status != HTTPStatus.OK:
                    return f"{engine.url} answers {answer.status}", None
                if answer.content_type != "application/json":
                    return None, None
                return None, await answer.json()
        except TimeoutError:
            return f"{engine.url} does not answer within {CALL_TIMEOUT_S:g} s", None
        except (aiohttp.ClientError, OSError) as error:
            return f"{engine.url}: {words_of(error)}", None


def _bad_gateway(problems: list[str]) -> web.Response:
    return web.json_response(
        {"error": {"message": "; ".join(problems), "type": "engine_failed", "code": HTTPStatus.BAD_GATEWAY}},
        status=HTTPStatus.BAD_GATEWAY,
    )
