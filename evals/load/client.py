"""Sends prompts to a cluster and times the answers: one alone, or a burst of all at once."""

from __future__ import annotations

import asyncio
import json
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


def send(url: str, prompts: Sequence[Sequence[int]]) -> Burst:
    """All prompts at once, to the router at `url`.  Raises EvalError when a request fails."""
    return asyncio.run(_burst(url, prompts))


async def _burst(url: str, prompts: Sequence[Sequence[int]]) -> Burst:
    timeout = aiohttp.ClientTimeout(total=None, sock_read=SILENCE_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as http:
        begun_s = time.perf_counter()
        answers = await asyncio.gather(*(_ask(http, url, prompt) for prompt in prompts))
        return Burst(list(answers), time.perf_counter() - begun_s)


async def _ask(http: aiohttp.ClientSession, url: str, prompt: Sequence[int]) -> Answer:
    sampling = {"temperature": 0, "max_new_tokens": OUTPUT_TOKENS, "ignore_eos": True}
    body = {"input_ids": list(prompt), "sampling_params": sampling, "stream": True}
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
    if first_s is None or len(last["output_ids"]) != OUTPUT_TOKENS:
        raise EvalError(f"{url}/generate ended early: {json.dumps(last)[:_BODY_SHOWN]}")
    return Answer(
        tuple(last["output_ids"]),
        last["meta_info"]["cached_tokens"],
        first_s - begun_s,
        time.perf_counter() - begun_s,
    )
