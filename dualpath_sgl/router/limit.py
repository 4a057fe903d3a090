"""How many requests are answered at once (`--max-concurrent-requests`).

The others wait for a while, or are sent away: at once where no more may wait, before their body is read.
Whoever waits has sent its whole body (fleet/body.py bounds what all bodies take).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from dualpath_sgl.router.fleet.errors import TooMany
from dualpath_sgl.router.settings.settings import LimitSettings


class RequestLimit:
    def __init__(self, settings: LimitSettings) -> None:
        self._settings = settings
        self._places = None if settings.at_once is None else asyncio.Semaphore(settings.at_once)
        self._waiting = 0

    def check(self) -> None:
        """Raises TooMany when one more request could not even wait."""
        if self._places is not None and self._places.locked() and self._waiting >= self._settings.waiting:
            raise TooMany(
                f"{self._settings.at_once} requests are being answered and {self._waiting} wait "
                "(--max-concurrent-requests, --queue-size); try again later"
            )

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Held while the request is answered.  Raises TooMany."""
        if self._places is None:
            yield
            return
        await self._take(self._places)
        try:
            yield
        finally:
            self._places.release()

    async def _take(self, places: asyncio.Semaphore) -> None:
        self.check()
        self._waiting += 1
        try:
            async with asyncio.timeout(self._settings.wait_s):
                await places.acquire()
        except TimeoutError:
            raise TooMany(
                f"{self._settings.at_once} requests were being answered for {self._settings.wait_s:g} s "
                "(--max-concurrent-requests, --queue-timeout-secs); try again later"
            ) from None
        finally:
            self._waiting -= 1
