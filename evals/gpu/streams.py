"""Requests that decode while others load: what a loading prompt costs those who are answered already."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple, TypeVar

import aiohttp

from dualpath_sgl.evals.common.nearest_rank import nearest_rank

PROMPT_TOKENS = 512
TOKEN_VALUES = 250
MOST_TOKENS = 8000
"""Of one answer: longer than anything that is measured beside it."""
WARM_S = 3.0
"""All streams have their first token, and decode together."""
END_S = 20.0

Result = TypeVar("Result")


class TokenTimes(NamedTuple):
    """Times per output token in milliseconds, of all streams together."""

    mean: float
    p50: float
    p99: float
    p999: float
    max: float
    tokens: int


def beside(url: str, streams: int, action: Callable[[], Result]) -> tuple[Result, TokenTimes]:
    """Run `action` while so many requests decode at `url`, and time their tokens meanwhile.

    Raises what `action` raises, and ValueError when no token came.
    """
    times: list[list[float]] = [[] for _ in range(streams)]
    stop = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(_decode(url, times, stop)), daemon=True)
    thread.start()
    try:
        while not all(len(of_one) > 1 for of_one in times) and thread.is_alive():
            time.sleep(0.05)
        time.sleep(WARM_S)
        begun_s = time.perf_counter()
        result = action()
        ended_s = time.perf_counter()
    finally:
        stop.set()
        thread.join(END_S)
    gaps = [b - a for of_one in times for a, b in pairwise(of_one) if begun_s <= a and b <= ended_s]
    return result, token_times(gaps)


def token_times(gaps_s: list[float]) -> TokenTimes:
    """Of seconds between tokens.  Raises ValueError when there are none."""
    if not gaps_s:
        raise ValueError("no token came in the time measured: the streams ended, or were never begun")
    ordered = sorted(1000 * gap for gap in gaps_s)

    def at(share: float) -> float:
        return round(nearest_rank(ordered, share), 3)

    return TokenTimes(
        round(statistics.fmean(ordered), 3), at(0.5), at(0.99), at(0.999), round(ordered[-1], 3), len(ordered)
    )


async def _decode(url: str, times: list[list[float]], stop: threading.Event) -> None:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, read_bufsize=1 << 22) as http:
        await asyncio.gather(*(_stream(http, url, of_one, stop) for of_one in times))


async def _stream(http: aiohttp.ClientSession, url: str, times: list[float], stop: threading.Event) -> None:
    prompt = [random.randrange(TOKEN_VALUES) for _ in range(PROMPT_TOKENS)]
    sampling = {"temperature": 0, "max_new_tokens": MOST_TOKENS, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": sampling, "stream": True}
    async with http.post(f"{url}/generate", json=body) as response:
        async for line in response.content:
            payload = line.removeprefix(b"data:").strip()
            if payload and payload != b"[DONE]" and json.loads(payload).get("output_ids"):
                times.append(time.perf_counter())
            if stop.is_set():
                return
