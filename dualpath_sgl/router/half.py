"""One engine's half of a request: a POST, and its answer as it comes."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType

import aiohttp
from opentelemetry.trace import Span

from dualpath_sgl.router.fleet import headers
from dualpath_sgl.router.fleet.engines import Engine, address
from dualpath_sgl.router.fleet.errors import EngineAnswered, EngineFailed, EngineRefused, words_of
from dualpath_sgl.router.request import ClientRequest
from dualpath_sgl.router.spans import RouterSpans, failed
from scheduler_svc.telemetry.tracing import traceparent_of

BUSY = 503
"""SGLang's answer when its queue is full or it is about to stop: it has not taken the request."""
CLIENT_ERRORS = range(400, 500)
_SHOWN_CHARACTERS = 500


class Half:
    """Leaving the context closes the connection unless the answer was read to its end: that is how
    SGLang learns that nobody waits for the request any more.
    """

    def __init__(
        self,
        http: aiohttp.ClientSession,
        spans: RouterSpans,
        parent: Span,
        engine: Engine,
        request: ClientRequest,
        body: bytes,
    ) -> None:
        self.engine = engine
        self._http = http
        self._spans = spans
        self._parent = parent
        self._request = request
        self._body = body
        self._response: aiohttp.ClientResponse | None = None
        self._lost = False
        self._stack = ExitStack()

    def __enter__(self) -> Half:
        attributes = {"dualpath.role": self.engine.role.value, "url.full": self.engine.url}
        self._span = self._stack.enter_context(self._spans.child("upstream", self._parent, attributes))
        self.engine.in_flight += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.engine.in_flight -= 1
        complete = self._response is not None and self._response.content.at_eof()
        if self._span.is_recording():
            self._span.set_attribute("dualpath.upstream.complete", complete)
        if self._response is not None and not complete:
            self._response.close()
        self._stack.close()

    @property
    def headers(self) -> dict[str, str]:
        """The answer's headers that the client gets."""
        return headers.to_client(self._answer.headers)

    @property
    def _answer(self) -> aiohttp.ClientResponse:
        assert self._response is not None, "an answer is read after open"
        return self._response

    async def open(self) -> None:
        """Until the engine has begun a good answer.

        Raises EngineRefused when it has not taken the request, EngineAnswered when it says that the
        request is wrong, and EngineFailed otherwise.
        """
        try:
            self._response = await self._http.post(
                address(self.engine, self._request.path, self._request.query),
                data=self._body,
                headers=headers.to_engine(self._request.headers, traceparent_of(self._span)),
                allow_redirects=False,
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            problem = f"takes no connection: {words_of(error)}"
            failed(self._span, problem)
            self.engine.refused(problem)
            raise EngineRefused(self.engine, problem) from None
        except (aiohttp.ClientError, OSError) as error:
            raise self._failure(words_of(error)) from None
        status = self._response.status
        self._span.set_attribute("http.response.status_code", status)
        if status == 200:
            return
        content = await self._read()
        if status in CLIENT_ERRORS:
            raise EngineAnswered(status, self.headers, content)
        problem = f"answers {status}: {content[:_SHOWN_CHARACTERS].decode(errors='replace')}"
        if status == BUSY:
            failed(self._span, problem)
            raise EngineRefused(self.engine, problem)
        raise self._failure(problem)

    async def chunk(self) -> bytes:
        """What has come, as soon as something has; empty at the end.  Raises EngineFailed."""
        try:
            content = await self._answer.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            raise self._failure(words_of(error)) from None
        if not content:
            self._answered()
        return content

    async def whole(self) -> bytes:
        """The rest of the answer.  Raises EngineFailed."""
        content = await self._read()
        self._answered()
        return content

    def _answered(self) -> None:
        """Its span ends here, and not with the other half."""
        self._span.set_attribute("dualpath.upstream.complete", True)
        self._span.end()

    async def _read(self) -> bytes:
        try:
            return await self._answer.read()
        except (aiohttp.ClientError, OSError) as error:
            raise self._failure(words_of(error)) from None

    async def lost(self) -> None:
        """Until health checks have given the engine up.  Then raises EngineFailed, here and in any
        read under way."""
        await self.engine.unwell.wait()
        self._lost = True
        if self._response is not None:
            self._response.close()
        raise self._failure("")

    def _failure(self, problem: str) -> EngineFailed:
        problem = self.engine.problem if self._lost else problem
        failed(self._span, problem)
        return EngineFailed(self.engine, problem)
