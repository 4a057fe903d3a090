"""As many requests at once as `--max-concurrent-requests` says; others wait, or are sent away with a 429."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from dualpath_sgl.router.fleet.errors import TooMany
from dualpath_sgl.router.limit import RequestLimit
from dualpath_sgl.router.settings.settings import LimitSettings

FOR_EVER_S = 60.0


def limit(at_once: int | None, waiting: int = 0, wait_s: float = FOR_EVER_S) -> RequestLimit:
    return RequestLimit(LimitSettings(at_once, waiting, wait_s))


async def taken(limit: RequestLimit, stack: AsyncExitStack, times: int) -> None:
    for _ in range(times):
        await stack.enter_async_context(limit.place())


def test_without_a_limit_nobody_waits():
    async def run() -> None:
        async with AsyncExitStack() as stack:
            await taken(limit(None), stack, 1000)

    asyncio.run(run())


def test_one_more_than_the_limit_is_sent_away_when_nobody_may_wait():
    async def run() -> None:
        places = limit(2)
        async with AsyncExitStack() as stack:
            await taken(places, stack, 2)
            with pytest.raises(TooMany, match="--max-concurrent-requests, --queue-size") as refused:
                await taken(places, stack, 1)
            assert refused.value.status == 429
        async with AsyncExitStack() as stack:
            await taken(places, stack, 2)

    asyncio.run(run())


def test_those_that_wait_get_a_place_in_turn_and_one_that_left_takes_none():
    async def run() -> None:
        places = limit(1, waiting=3)
        order: list[int] = []

        async def request(number: int) -> None:
            async with places.place():
                order.append(number)

        async with AsyncExitStack() as stack:
            await taken(places, stack, 1)
            waiting = [asyncio.create_task(request(number)) for number in range(3)]
            await asyncio.sleep(0)
            with pytest.raises(TooMany):
                await taken(places, stack, 1)
            waiting[1].cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert order == [0, 2]
        async with AsyncExitStack() as stack:
            await taken(places, stack, 1)

    asyncio.run(run())


def test_one_that_waited_too_long_is_sent_away():
    async def run() -> None:
        places = limit(1, waiting=1, wait_s=0.01)
        async with AsyncExitStack() as stack:
            await taken(places, stack, 1)
            with pytest.raises(TooMany, match="for 0.01 s .*--queue-timeout-secs"):
                await taken(places, stack, 1)

    asyncio.run(run())
