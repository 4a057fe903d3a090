"""The body of a client's request."""

from __future__ import annotations

from aiohttp import web

from dualpath_sgl.router.fleet.errors import TooLarge


async def body_of(request: web.Request) -> bytes:
    """Raises TooLarge."""
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise TooLarge(str(error.text)) from None
