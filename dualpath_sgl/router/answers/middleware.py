"""Whatever goes wrong with a request, its client gets JSON."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web

from dualpath_sgl.router.answers.dialects import error_body
from dualpath_sgl.router.fleet.errors import NotFound, RouteError, WrongMethod

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except RouteError as error:
        return _response(error, request)
    except web.HTTPNotFound:
        return _response(NotFound(request.path), request)
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        response = _response(WrongMethod(request.method, request.path, allowed), request)
        response.headers["Allow"] = allowed
        return response


def _response(error: RouteError, request: web.Request) -> web.Response:
    return web.Response(
        status=error.status, body=error_body(error, request.path), content_type="application/json"
    )
