"""Replays a workload against an SGLang HTTP endpoint, as agents that wait for each answer.

Every agent sends the turns of its session in order, with forced generation length and temperature 0; the
next as soon as the last has ended, or after the trace's think time where `Pace` asks for it.  Offline all
agents live from the start and take turns: `concurrency` requests are in flight at once, so more agents
than that means more context than one engine can keep.  Online each agent comes at its own time.  One
failed request ends the replay: nothing is retried, so what is measured is what was asked.

Each request names its session and carries the `traceparent` of its span `dualpath.request`; the answer is
streamed (evals/agents/talk.py says how it is asked for and read).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import aiohttp
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer

from dualpath_sgl.evals.agents.chat import ChatWorkload
from dualpath_sgl.evals.agents.talk import Answer, Talk, talks
from dualpath_sgl.evals.agents.workload import Workload
from dualpath_sgl.evals.common.errors import EvalError
from scheduler_svc.telemetry.tracing import traceparent_of

SILENCE_TIMEOUT_S = 120.0
"""A stream that brings nothing for so long has failed."""
_READ_BUFFER_BYTES = 16 * 1024 * 1024
"""Longest event: each holds the whole answer so far."""
_BODY_SHOWN = 2000


class ReplayError(EvalError):
    """A request failed; the message has the HTTP status and body."""


class RequestRecord(NamedTuple):
    """What one request took.  Times in seconds."""

    session: str
    turn: int
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    """Prompt tokens the server did not compute (`meta_info.cached_tokens`)."""
    theoretical_hit_tokens: int
    started_s: float
    """Since the replay began."""
    ttft_s: float
    """To the first token."""
    ttst_s: float | None
    """From the first to the second token; None for a single one."""
    tpot_s: float | None
    """Mean from token to token after the first; None for a single one."""
    e2e_s: float
    trace_id: str


class Replay(NamedTuple):
    """What a replay brought."""

    records: list[RequestRecord]
    """In the order in which the requests ended."""
    answers: dict[str, list[Answer]]
    """Session id -> what was generated in each turn: token ids, or the text of a chat."""
    job_s: float
    """Job completion time: from the first request's start to the last one's end."""


class Pace(NamedTuple):
    """When requests are sent."""

    concurrency: int | None = None
    """Requests in flight at most; None: no limit."""
    starts_s: Sequence[float] | None = None
    """When each agent comes, seconds after the replay began; None: all at once."""
    think: float = 0.0
    """Times the trace's think times, which pass before the next turn is sent; 0: none."""
    longest_think_s: float = 60.0
    """No agent thinks longer: in traces, people go home."""

    def think_s(self, in_trace_s: float) -> float:
        return min(self.longest_think_s, self.think * in_trace_s)


def replay(
    workload: Workload | ChatWorkload,
    url: str,
    *,
    pace: Pace,
    vocab_size: int,
    seed: int,
    tracer: Tracer,
    on_request: Callable[[RequestRecord], None] = lambda record: None,
    until: Callable[[RequestRecord], bool] = lambda record: False,
) -> Replay:
    """Run the workload against `url` (scheme, host and port).

    It ends before its time when `until` holds of a request that has ended: requests in flight are then given
    up.  Raises ReplayError.
    """
    if pace.concurrency is not None and pace.concurrency < 1:
        raise EvalError(f"concurrency is {pace.concurrency}; give at least 1")
    player = _Player(pace, tracer, on_request, until)
    try:
        return asyncio.run(player.play(url, talks(workload, vocab_size, seed)))
    except* ReplayError as failures:
        raise _first(failures) from None


def _first(group: BaseExceptionGroup) -> BaseException:
    found = group.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found


class _Enough(Exception):
    """`until` holds."""


class _Player:
    """One replay."""

    def __init__(
        self,
        pace: Pace,
        tracer: Tracer,
        on_request: Callable[[RequestRecord], None],
        until: Callable[[RequestRecord], bool],
    ) -> None:
        self._pace = pace
        self._in_flight = asyncio.Semaphore(pace.concurrency or 1 << 30)  # first come, first served
        self._tracer = tracer
        self._on_request = on_request
        self._until = until
        self._records: list[RequestRecord] = []
        self._answers: dict[str, list[Answer]] = {}

    async def play(self, url: str, agents: Sequence[Talk]) -> Replay:
        self._url = url
        self._begin = time.perf_counter()
        timeout = aiohttp.ClientTimeout(total=None, sock_read=SILENCE_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0)
        try:
            async with (
                aiohttp.ClientSession(
                    timeout=timeout, connector=connector, read_bufsize=_READ_BUFFER_BYTES
                ) as http,
                asyncio.TaskGroup() as group,
            ):
                for talk, start_s in zip(agents, self._pace.starts_s or [0.0] * len(agents), strict=True):
                    group.create_task(self._agent(http, talk, start_s))
        except* _Enough:
            pass
        return Replay(self._records, self._answers, time.perf_counter() - self._begin)

    async def _agent(self, http: aiohttp.ClientSession, talk: Talk, start_s: float) -> None:
        await asyncio.sleep(start_s)
        for index in range(talk.turns):
            if index and (wait_s := self._pace.think_s(talk.think_s(index))):
                await asyncio.sleep(wait_s)
            async with self._in_flight:
                record, answer = await self._request(http, talk, index)
            self._answers.setdefault(talk.id, []).append(answer)
            self._records.append(record)
            self._on_request(record)
            if self._until(record):
                raise _Enough

    async def _request(
        self, http: aiohttp.ClientSession, talk: Talk, index: int
    ) -> tuple[RequestRecord, Answer]:
        question = talk.ask()
        address = f"{self._url}{talk.path}"
        attributes: dict[str, str | int] = {
            "dualpath.session": talk.id,
            "dualpath.turn": index,
            "dualpath.prompt.tokens": question.prompt_tokens,
            "dualpath.output.tokens": question.output_tokens,
            "dualpath.hit.theory.tokens": question.hit_tokens,
        }
        with self._tracer.start_as_current_span(
            "dualpath.request", kind=SpanKind.CLIENT, attributes=attributes
        ) as span:
            # A router that places by session keeps an agent with the engines that hold its pages.
            headers = {"X-Session-Id": talk.id}
            if parent := traceparent_of(span):
                headers["traceparent"] = parent
            start = time.perf_counter()
            arrivals: list[tuple[float, int]] = []
            reply = talk.reply()
            try:
                async with http.post(address, json=question.body, headers=headers) as response:
                    if response.status != 200:
                        raise ReplayError(
                            f"session {talk.id} turn {index}: HTTP {response.status} from {address}: "
                            f"{(await response.text())[:_BODY_SHOWN]}"
                        )
                    async for line in response.content:
                        if (event := _event(line)) is None:
                            continue
                        if "error" in event:
                            raise ReplayError(
                                f"session {talk.id} turn {index}: {address} ended with "
                                f"{json.dumps(event['error'])[:_BODY_SHOWN]}"
                            )
                        reply.take(event)
                        if reply.arrived > (arrivals[-1][1] if arrivals else 0):
                            arrivals.append((time.perf_counter(), reply.arrived))
            except (aiohttp.ClientError, TimeoutError) as error:
                problem = str(error) or type(error).__name__
                raise ReplayError(f"session {talk.id} turn {index}: {address}: {problem}") from None
            end = time.perf_counter()
            if reply.output_tokens != question.output_tokens:
                message = (
                    f"session {talk.id} turn {index}: {address} gave {reply.output_tokens} tokens, "
                    f"{question.output_tokens} asked for; it ended with "
                    f"{json.dumps(reply.finish_reason)[:_BODY_SHOWN]}"
                )
                span.set_status(Status(StatusCode.ERROR, message))
                raise ReplayError(message)
            talk.answered(reply)
            first_s, first_count = arrivals[0] if arrivals else (end, reply.output_tokens)
            rest = reply.output_tokens - first_count
            record = RequestRecord(
                session=talk.id,
                turn=index,
                prompt_tokens=reply.prompt_tokens or question.prompt_tokens,
                output_tokens=reply.output_tokens,
                cached_tokens=reply.cached_tokens,
                theoretical_hit_tokens=question.hit_tokens,
                started_s=start - self._begin,
                ttft_s=first_s - start,
                ttst_s=arrivals[1][0] - first_s if len(arrivals) > 1 else None,
                tpot_s=(arrivals[-1][0] - first_s) / rest if rest else None,
                e2e_s=end - start,
                trace_id=f"{span.get_span_context().trace_id:032x}",
            )
            span.set_attribute("dualpath.cached.tokens", reply.cached_tokens)
            span.set_attribute("dualpath.ttft_s", record.ttft_s)
            return record, reply.answer


def _event(line: bytes) -> dict[str, Any] | None:
    """The JSON object of one line of an event stream; None for empty lines and the end mark."""
    if not line.startswith(b"data:"):
        return None
    payload = line[len(b"data:") :].strip()
    return None if payload == b"[DONE]" else json.loads(payload)
