"""The bodies of clients' requests: none is waited for without end, and together they are bounded.

A request gets its place among those that are answered (limit.py) only when its body is here: clients that send
slowly, or nothing at all, keep nobody else waiting.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from dualpath_sgl.router.fleet.errors import SlowBody, TooLarge, TooMany

IDLE_S = 30.0
"""The longest pause of a client that sends its body."""
OF_THE_LARGEST = 2
"""All bodies together take at most so many times the largest one."""


async def body_of(request: web.Request) -> bytes:
    """Raises TooLarge."""
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise TooLarge(str(error.text)) from None


class Bodies:
    """Of all requests that are open."""

    def __init__(self, largest_bytes: int, idle_s: float = IDLE_S) -> None:
        self._largest_bytes = largest_bytes
        self._idle_s = idle_s
        self.held_bytes = 0
        """In memory, whole or not."""

    @asynccontextmanager
    async def body(self, request: web.Request) -> AsyncIterator[bytes]:
        """Kept while the request is open.  Raises TooLarge, TooMany and SlowBody."""
        body = bytearray()
        held_bytes = 0
        try:
            while chunk := await self._next(request):
                body += chunk
                held_bytes += len(chunk)
                self.held_bytes += len(chunk)
                self._check(len(body))
            whole = bytes(body)
            body.clear()
            yield whole
        finally:
            self.held_bytes -= held_bytes

    async def _next(self, request: web.Request) -> bytes:
        """Empty at the end."""
        try:
            async with asyncio.timeout(self._idle_s):
                return await request.content.readany()
        except TimeoutError:
            raise SlowBody(self._idle_s) from None

    def _check(self, byte_count: int) -> None:
        if byte_count > self._largest_bytes:
            raise TooLarge(f"Maximum request body size {self._largest_bytes} exceeded")
        if self.held_bytes > OF_THE_LARGEST * self._largest_bytes:
            raise TooMany(
                f"the bodies of open requests take more than {OF_THE_LARGEST} times --max-payload-size; "
                "try again later"
            )
