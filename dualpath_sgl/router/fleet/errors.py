"""What a client is told when its request cannot be answered.

    400 bad_request    the body is no JSON object, asks for what SGLang would not answer (refusals.py), or the
                       path is one that a pair of engines cannot serve (paths.py)
    404 not_found      no such path
    405 wrong_method   the path has others
    408 slow_body      the client pauses too long while it sends the body
    413 too_large      the body is longer than --max-payload-size
    429 too_many       --max-concurrent-requests are being answered, or the bodies of all take too much memory
    502 engine_failed  an engine that had taken the request failed; the other half was ended
    503 no_engine      no engine of a role takes requests
    504 time_limit     the request took longer than --request-timeout-secs

Anything else with status 4xx is an engine's own answer, passed on unchanged.
"""

from __future__ import annotations

from http import HTTPStatus

import aiohttp

from dualpath_sgl.router.fleet.engines import Engine

RETRY_AFTER_S = 1
RETRY_LATER = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)


class RouteError(Exception):
    """Ends a request; the message names the engine, what it did and what to do."""

    def __init__(self, status: HTTPStatus, kind: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind


class BadRequest(RouteError):
    def __init__(self, message: str) -> None:
        super().__init__(HTTPStatus.BAD_REQUEST, "bad_request", message)


class NotFound(RouteError):
    def __init__(self, path: str) -> None:
        super().__init__(HTTPStatus.NOT_FOUND, "not_found", f"{path} is no path of this router")


class WrongMethod(RouteError):
    def __init__(self, method: str, path: str, allowed: str) -> None:
        super().__init__(HTTPStatus.METHOD_NOT_ALLOWED, "wrong_method", f"{method} {path}: use {allowed}")


class SlowBody(RouteError):
    def __init__(self, idle_s: float) -> None:
        super().__init__(
            HTTPStatus.REQUEST_TIMEOUT,
            "slow_body",
            f"nothing more of the body came for {idle_s:g} s; send it again",
        )


class TooLarge(RouteError):
    def __init__(self, message: str) -> None:
        super().__init__(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_large", f"{message} (--max-payload-size)")


class TooMany(RouteError):
    def __init__(self, message: str) -> None:
        super().__init__(HTTPStatus.TOO_MANY_REQUESTS, "too_many", message)


class NoEngine(RouteError):
    def __init__(self, message: str) -> None:
        super().__init__(HTTPStatus.SERVICE_UNAVAILABLE, "no_engine", message)


class TimeLimit(RouteError):
    def __init__(self, limit_s: float) -> None:
        super().__init__(
            HTTPStatus.GATEWAY_TIMEOUT,
            "time_limit",
            f"no complete answer within {limit_s:g} s; both engines were told to stop (--request-timeout-secs)",
        )


class EngineFailed(RouteError):
    """After it had taken the request: nobody else gets it, because it may be what broke the engine."""

    def __init__(self, engine: Engine, problem: str) -> None:
        super().__init__(
            HTTPStatus.BAD_GATEWAY,
            "engine_failed",
            f"{engine.role} engine {engine.url} failed: {problem}; the other engine's half was ended, "
            "send the request again",
        )
        self.engine = engine


class EngineRefused(Exception):
    """An engine did not take the request: another one may."""

    def __init__(self, engine: Engine, problem: str) -> None:
        super().__init__(f"{engine.url} {problem}")
        self.engine = engine
        self.problem = problem


class EngineAnswered(Exception):
    """An engine answered that the request itself is wrong: its answer is the answer."""

    def __init__(self, status: int, headers: dict[str, str], content: bytes) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status
        self.headers = headers
        self.content = content


def words_of(error: BaseException) -> str:
    """A connection's error, never empty and without aiohttp's words about TLS."""
    if isinstance(error, aiohttp.ClientConnectorError):
        error = error.os_error
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
