"""Sends prompts to a cluster and times the answers: one alone, or a burst of all at once."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from typing import NamedTuple

import aiohttp

from dualpath_sgl.evals.common.errors import EvalError

OUTPUT_TOKENS = 4
"""A few, greedy: enough to see that the KV was right, too few to cost decode time."""
SILENCE_TIMEOUT_S = 180.0
_BODY_SHOWN = 1000


class Answer(NamedTuple):
    tokens: tuple[int, ...]
    cached_tokens: int
    """Prompt tokens the cluster did not compute."""
    ttft_s: float
    e2e_s: float


class Burst(NamedTuple):
    answers: list[Answer]
    """In the order of the prompts."""
    job_s: float
    """Job completion time (JCT): from sending the first request to the end of the last answer."""


class Pair(NamedTuple):
    """A prefill and a decode engine that serve a request together, chosen by the client instead of a router."""

    prefill_url: str
    bootstrap_host: str
    bootstrap_port: int
    decode_url: str


Asked = tuple[str | Pair, Sequence[int]]
"""Who is asked, and the prompt."""


def send(url: str, prompts: Sequence[Sequence[int]]) -> Burst:
    """All prompts at once, to the router at `url`.  Raises EvalError when a request fails."""
    return asyncio.run(_burst([(url, prompt) for prompt in prompts]))


def send_to(pairs: Sequence[Pair], prompts: Sequence[Sequence[int]]) -> Burst:
    """All prompts at once, each to its pair of engines, as a router sends them.  Raises EvalError."""
    return asyncio.run(_burst(list(zip(pairs, prompts, strict=True))))


async def _burst(asked: Sequence[Asked]) -> Burst:
    timeout = aiohttp.ClientTimeout(total=None, sock_read=SILENCE_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as http:
        begun_s = time.perf_counter()
        answers = await asyncio.gather(*(_ask(http, *one) for one in asked))
        return Burst(list(answers), time.perf_counter() - begun_s)


async def _ask(http: aiohttp.ClientSession, whom: str | Pair, prompt: Sequence[int]) -> Answer:
    sampling = {"temperature": 0, "max_new_tokens": OUTPUT_TOKENS, "ignore_eos": True}
    body = {"input_ids": list(prompt), "sampling_params": sampling, "stream": True}
    if isinstance(whom, str):
        return await _stream(http, whom, body)
    body |= {
        "bootstrap_host": whom.bootstrap_host,
        "bootstrap_port": whom.bootstrap_port,
        "bootstrap_room": random.getrandbits(63),
    }
    # The prefill engine's own answer is the first token; the decode engine's is the whole.
    answer, _ = await asyncio.gather(
        _stream(http, whom.decode_url, body), _stream(http, whom.prefill_url, body, least_tokens=1)
    )
    return answer


async def _stream(
    http: aiohttp.ClientSession, url: str, body: dict, least_tokens: int = OUTPUT_TOKENS
) -> Answer:
    begun_s = time.perf_counter()
    first_s = None
    last: dict = {}
    try:
        async with http.post(f"{url}/generate", json=body) as response:
            if response.status != 200:
                raise EvalError(
                    f"HTTP {response.status} from {url}/generate: {(await response.text())[:_BODY_SHOWN]}"
                )
            async for line in response.content:
                payload = line.removeprefix(b"data:").strip()
                if not payload or payload == b"[DONE]":
                    continue
                last = json.loads(payload)
                if first_s is None and last.get("output_ids"):
                    first_s = time.perf_counter()
    except (aiohttp.ClientError, TimeoutError) as error:
        raise EvalError(f"{url}/generate failed: {error or type(error).__name__}") from None
    if first_s is None or len(last["output_ids"]) < least_tokens:
        raise EvalError(f"{url}/generate ended early: {json.dumps(last)[:_BODY_SHOWN]}")
    return Answer(
        tuple(last["output_ids"]),
        last["meta_info"]["cached_tokens"],
        first_s - begun_s,
        time.perf_counter() - begun_s,
    )
