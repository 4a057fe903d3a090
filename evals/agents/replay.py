"""Replays a workload against an SGLang HTTP endpoint, as agents that wait for each answer.

Every agent sends the turns of its session in order, the next as soon as the last has ended (tool
time zero), with forced generation length and temperature 0.  All agents live from
the start and take turns: `concurrency` requests are in flight at once, so more agents than that
means more context than one engine can keep.  One failed request ends the replay: nothing is retried, so
what is measured is what was asked.

Each request names its session and carries the `traceparent` of its span `dualpath.request`; the answer is streamed
(`/generate`, server-sent events; each event holds all `output_ids` so far).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import aiohttp
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer

from dualpath_sgl.evals.agents.conversation import Conversation
from dualpath_sgl.evals.agents.workload import Turn, Workload
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
    answers: dict[str, list[list[int]]]
    """Session id -> generated token ids of each turn."""
    job_s: float
    """Job completion time: from the first request's start to the last one's end."""


def replay(
    workload: Workload,
    url: str,
    *,
    concurrency: int,
    vocab_size: int,
    seed: int,
    tracer: Tracer,
    on_request: Callable[[RequestRecord], None] = lambda record: None,
) -> Replay:
    """Run the workload against `url` (scheme, host and port).  Raises ReplayError."""
    if concurrency < 1:
        raise EvalError(f"concurrency is {concurrency}; give at least 1")
    conversations = [Conversation(plan, vocab_size, seed) for plan in workload.sessions]
    player = _Player(workload.page_size, concurrency, tracer, on_request)
    try:
        return asyncio.run(player.play(url, conversations))
    except* ReplayError as failures:
        raise _first(failures) from None


def _first(group: BaseExceptionGroup) -> BaseException:
    found = group.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found


class _Player:
    """One replay."""

    def __init__(
        self,
        page_size: int,
        concurrency: int,
        tracer: Tracer,
        on_request: Callable[[RequestRecord], None],
    ) -> None:
        self._page_size = page_size
        self._in_flight = asyncio.Semaphore(concurrency)  # first come, first served
        self._tracer = tracer
        self._on_request = on_request
        self._records: list[RequestRecord] = []
        self._answers: dict[str, list[list[int]]] = {}

    async def play(self, url: str, conversations: Iterable[Conversation]) -> Replay:
        self._address = f"{url}/generate"
        self._begin = time.perf_counter()
        timeout = aiohttp.ClientTimeout(total=None, sock_read=SILENCE_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0)
        async with (
            aiohttp.ClientSession(
                timeout=timeout, connector=connector, read_bufsize=_READ_BUFFER_BYTES
            ) as http,
            asyncio.TaskGroup() as agents,
        ):
            for conversation in conversations:
                agents.create_task(self._agent(http, conversation))
        return Replay(self._records, self._answers, time.perf_counter() - self._begin)

    async def _agent(self, http: aiohttp.ClientSession, conversation: Conversation) -> None:
        session = conversation.plan.id
        for index, turn in enumerate(conversation.plan.turns):
            async with self._in_flight:
                record, tokens = await self._request(http, session, index, turn, conversation.prompt())
            conversation.answer(tokens)
            self._answers.setdefault(session, []).append(tokens)
            self._records.append(record)
            self._on_request(record)

    async def _request(
        self, http: aiohttp.ClientSession, session: str, index: int, turn: Turn, prompt: list[int]
    ) -> tuple[RequestRecord, list[int]]:
        hit_tokens = turn.hit_tokens(self._page_size)
        attributes: dict[str, str | int] = {
            "dualpath.session": session,
            "dualpath.turn": index,
            "dualpath.prompt.tokens": len(prompt),
            "dualpath.output.tokens": turn.output_tokens,
            "dualpath.hit.theory.tokens": hit_tokens,
        }
        body = {
            "input_ids": prompt,
            "sampling_params": {
                "temperature": 0.0,
                "max_new_tokens": turn.output_tokens,
                "ignore_eos": True,
            },
            "stream": True,
        }
        with self._tracer.start_as_current_span(
            "dualpath.request", kind=SpanKind.CLIENT, attributes=attributes
        ) as span:
            # A router that places by session keeps an agent with the engines that hold its pages.
            headers = {"X-Session-Id": session}
            if parent := traceparent_of(span):
                headers["traceparent"] = parent
            start = time.perf_counter()
            arrivals: list[tuple[float, int]] = []
            last: dict[str, Any] = {}
            try:
                async with http.post(self._address, json=body, headers=headers) as response:
                    if response.status != 200:
                        raise ReplayError(
                            f"session {session} turn {index}: HTTP {response.status} from {self._address}: "
                            f"{(await response.text())[:_BODY_SHOWN]}"
                        )
                    async for line in response.content:
                        if (event := _event(line)) is None:
                            continue
                        if "error" in event:
                            raise ReplayError(
                                f"session {session} turn {index}: {self._address} ended with "
                                f"{json.dumps(event['error'])[:_BODY_SHOWN]}"
                            )
                        last = event
                        count = len(event["output_ids"])
                        if count > (arrivals[-1][1] if arrivals else 0):
                            arrivals.append((time.perf_counter(), count))
            except (aiohttp.ClientError, TimeoutError) as error:
                problem = str(error) or type(error).__name__
                raise ReplayError(f"session {session} turn {index}: {self._address}: {problem}") from None
            end = time.perf_counter()
            tokens = list(last.get("output_ids", ()))
            if len(tokens) != turn.output_tokens:
                finish = last.get("meta_info", {}).get("finish_reason")
                message = (
                    f"session {session} turn {index}: {self._address} gave {len(tokens)} tokens, "
                    f"{turn.output_tokens} asked for; it ended with {json.dumps(finish)[:_BODY_SHOWN]}"
                )
                span.set_status(Status(StatusCode.ERROR, message))
                raise ReplayError(message)
            cached_tokens = int(last["meta_info"].get("cached_tokens", 0))
            first_s, first_count = arrivals[0]
            rest = len(tokens) - first_count
            record = RequestRecord(
                session=session,
                turn=index,
                prompt_tokens=len(prompt),
                output_tokens=len(tokens),
                cached_tokens=cached_tokens,
                theoretical_hit_tokens=hit_tokens,
                started_s=start - self._begin,
                ttft_s=first_s - start,
                ttst_s=arrivals[1][0] - first_s if len(arrivals) > 1 else None,
                tpot_s=(arrivals[-1][0] - first_s) / rest if rest else None,
                e2e_s=end - start,
                trace_id=f"{span.get_span_context().trace_id:032x}",
            )
            span.set_attribute("dualpath.cached.tokens", cached_tokens)
            span.set_attribute("dualpath.ttft_s", record.ttft_s)
            return record, tokens


def _event(line: bytes) -> dict[str, Any] | None:
    """The JSON object of one line of an event stream; None for empty lines and the end mark."""
    if not line.startswith(b"data:"):
        return None
    payload = line[len(b"data:") :].strip()
    return None if payload == b"[DONE]" else json.loads(payload)
