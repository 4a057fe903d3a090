"""One attempt at a request: both engines' halves at once.

The PE computes the prompt and hands its KV to the DE; the DE answers.  Left alone, one of them
would wait for the other until SGLang's bootstrap time-out, so the first failure of either ends
both.  Once the DE's first token is here the PE has done its part, and what becomes of the PE no
longer matters.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import aiohttp
from opentelemetry.trace import Span

from dualpath_sgl.router.answers.logprobs import StreamJoiner, join
from dualpath_sgl.router.answers.problems import problem_in
from dualpath_sgl.router.fleet.errors import EngineAnswered, EngineFailed, EngineRefused
from dualpath_sgl.router.half import CLIENT_ERRORS, Half
from dualpath_sgl.router.pairing import Pair
from dualpath_sgl.router.request import ClientRequest
from dualpath_sgl.router.spans import RouterSpans
from scheduler_svc.wire.protocol import Role

SETTLE_TIMEOUT_S = 5.0
"""The PE's answer ends about when the DE's begins; its connection is closed after this long."""
_TELLING = (EngineAnswered, EngineRefused, EngineFailed)
"""Which of two errors explains more: the other one is often its consequence."""


Found = TypeVar("Found")


class Beginning(NamedTuple):
    """How the DE's answer begins."""

    headers: dict[str, str]
    content: bytes
    """The whole answer, or a stream's first chunk."""


_closing: set[asyncio.Task[None]] = set()
"""Exchanges whose client has everything or is gone."""


class Exchange:
    """`async with`: leaving it with an error ends both halves at once, whatever they are doing."""

    def __init__(
        self,
        http: aiohttp.ClientSession,
        spans: RouterSpans,
        parent: Span,
        request: ClientRequest,
        pair: Pair,
    ) -> None:
        self._request = request
        self._prefill, self._decode = (
            Half(
                http,
                spans,
                parent,
                pair.engine(role),
                request,
                request.body_for(pair.prefill, pair.room, dp_rank_fields(pair, role)),
            )
            for role in (Role.PREFILL, Role.DECODE)
        )
        self._stack = ExitStack()
        self._tasks: list[asyncio.Task[Any]] = []
        self._joiner: StreamJoiner | None = None

    async def __aenter__(self) -> Exchange:
        for half in (self._prefill, self._decode):
            self._stack.enter_context(half)
        self._computing = self._begin(self._prefill_answer())
        self._generating = self._begin(self._decode_answer())
        for half in (self._prefill, self._decode):
            self._begin(half.lost())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A task of its own: the client may close its connection now, which cancels the caller.
        closing = asyncio.create_task(self._close(is_whole=error is None))
        _closing.add(closing)
        closing.add_done_callback(_closing.discard)
        await asyncio.shield(closing)

    async def _close(self, *, is_whole: bool) -> None:
        try:
            if is_whole:
                # Let the PE's answer end by itself, so that its connection can be used again.
                await asyncio.wait([self._computing], timeout=SETTLE_TIMEOUT_S)
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        finally:
            self._stack.close()

    async def first(self) -> Beginning:
        """Raises EngineRefused, EngineAnswered or EngineFailed."""
        waiting = set(self._tasks)
        while True:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if self._is_answered():
                return self._beginning()
            if errors := [error for task in done if (error := task.exception()) is not None]:
                raise min(errors, key=_how_telling)

    async def rest(self) -> AsyncIterator[bytes]:
        """A stream's chunks after the first.  Raises EngineFailed."""
        while chunk := await self._decode.chunk():
            yield self._joiner.feed(chunk) if self._joiner else chunk

    def _begin(self, work: Coroutine[Any, Any, Found]) -> asyncio.Task[Found]:
        task = asyncio.create_task(work)
        self._tasks.append(task)
        return task

    def _is_answered(self) -> bool:
        needed = [self._generating, *([self._computing] if self._request.wants_logprobs else [])]
        return all(task.done() and task.exception() is None for task in needed)

    def _beginning(self) -> Beginning:
        content = self._generating.result()
        if self._request.wants_logprobs:
            if self._request.streams:
                self._joiner = StreamJoiner(self._request.path, self._computing.result())
                content = self._joiner.feed(content)
            else:
                content = join(self._request.path, self._computing.result(), content)
        return Beginning(self._decode.headers, content)

    async def _prefill_answer(self) -> bytes:
        await self._prefill.open()
        content = await self._prefill.whole()
        if (problem := problem_in(content)) is not None:
            if problem.status in CLIENT_ERRORS:
                raise EngineAnswered(200, self._prefill.headers, content)
            raise EngineFailed(self._prefill.engine, problem.message)
        return content

    async def _decode_answer(self) -> bytes:
        await self._decode.open()
        if not self._request.streams:
            return await self._decode.whole()
        if not (chunk := await self._decode.chunk()):
            raise EngineFailed(self._decode.engine, "its stream ended before it began")
        return chunk


def dp_rank_fields(pair: Pair, role: Role) -> dict[str, int]:
    """How SGLang's servers are told which of their DP ranks serves a request.

    Both get the prefill side's rank: with it the decode engine asks that rank, and the prefill engine does
    not insist on rank `room % dp_size`, which is where the decode engine would look otherwise
    (SGLang's disaggregation/common/conn.py, CommonKVSender, and decode.py, _resolve_prefill_dp_rank).
    """
    fields = {
        "routed_dp_rank": pair.dp_ranks.get(role),
        "disagg_prefill_dp_rank": pair.dp_ranks.get(Role.PREFILL),
    }
    return {name: rank for name, rank in fields.items() if rank is not None}


def _how_telling(error: BaseException) -> int:
    return next((rank for rank, kind in enumerate(_TELLING) if isinstance(error, kind)), len(_TELLING))
