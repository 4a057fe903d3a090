"""The client's side of a request: one answer, or a stream that may have to end with an error."""

from __future__ import annotations

import time
from http import HTTPStatus

from aiohttp import web

from dualpath_sgl.router.answers.dialects import error_body, error_events
from dualpath_sgl.router.answers.events import EVENT_END
from dualpath_sgl.router.fleet.errors import RETRY_AFTER_S, RETRY_LATER, RouteError


class Reply:
    """What is written is sent at once.  Raises ConnectionError when the client is gone."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._response: web.StreamResponse | None = None
        self.streams = False
        """The client wants a stream."""
        self.begun_s: float | None = None
        """When the answer began (time.monotonic)."""
        self.ended_s: float | None = None
        """When the client was sent everything."""
        self.error: str | None = None
        """Kind of the error that the client was told."""
        self.trace_id: str | None = None
        """Of the trace that it is a part of, if that is exported."""
        self._event_is_open = False
        """What was written last is not the end of an event."""

    @property
    def status(self) -> int | None:
        """Once the answer has begun."""
        return None if self._response is None else self._response.status

    @property
    def ended(self) -> bool:
        return self.ended_s is not None

    async def whole(self, status: int, headers: dict[str, str], content: bytes) -> web.StreamResponse:
        response = await self._prepare(web.Response(status=status, headers=headers, body=content))
        await self.end()
        return response

    async def begin(self, headers: dict[str, str]) -> web.StreamResponse:
        return await self._prepare(web.StreamResponse(status=HTTPStatus.OK, headers=headers))

    async def write(self, chunk: bytes) -> None:
        if chunk:
            self._event_is_open = not chunk.endswith(EVENT_END)
            await self._begun.write(chunk)

    async def end(self) -> None:
        await self._begun.write_eof()
        self.ended_s = time.monotonic()

    async def fail(self, error: RouteError) -> web.StreamResponse:
        """As an HTTP error, or as the last events of a stream that has begun."""
        self.error = error.kind
        if self._response is None:
            headers = {"Content-Type": "application/json"}
            if error.status in RETRY_LATER:
                headers["Retry-After"] = str(RETRY_AFTER_S)
            return await self.whole(error.status, headers, error_body(error, self._request.path))
        if not self.ended:
            events = error_events(error, self._request.path)
            await self.write((EVENT_END if self._event_is_open else b"") + events)
            await self.end()
        return self._response

    async def _prepare(self, response: web.StreamResponse) -> web.StreamResponse:
        self._response = response
        self.begun_s = time.monotonic()
        await response.prepare(self._request)
        return response

    @property
    def _begun(self) -> web.StreamResponse:
        assert self._response is not None, "an answer is written after whole or begin"
        return self._response
