"""Keeps what is known of each engine true: one task per engine asks its health endpoint.

Interval, time limit, endpoint and counts are the Rust router's own `--health-...` arguments.
"""

from __future__ import annotations

import asyncio
import logging
import math
from contextlib import suppress

import aiohttp

from dualpath_sgl.router.fleet.engines import Engine, EngineDirectory
from dualpath_sgl.router.fleet.errors import words_of
from dualpath_sgl.router.settings.settings import HealthSettings

logger = logging.getLogger(__name__)

DOWN_INTERVAL_S = 1.0
"""Between two checks of an engine that is down: requests wait for its return."""
FORGET_S = 60.0
"""An engine that only the scheduler has named is forgotten after being down for this long."""


class HealthWatch:
    def __init__(self, http: aiohttp.ClientSession, settings: HealthSettings) -> None:
        self._http = http
        self._settings = settings
        self._timeout = aiohttp.ClientTimeout(total=settings.timeout_s)
        self._tasks: set[asyncio.Task[None]] = set()

    def watch(self, directory: EngineDirectory, engine: Engine) -> None:
        task = asyncio.create_task(self._watch(directory, engine), name=f"health {engine.url}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def problem(self, engine: Engine) -> str | None:
        """One check; None when the engine is well."""
        try:
            async with self._http.get(
                engine.url + self._settings.path, timeout=self._timeout, allow_redirects=False
            ) as answer:
                return None if answer.status == 200 else f"{self._settings.path} answers {answer.status}"
        except TimeoutError:
            return f"{self._settings.path} does not answer within {self._settings.timeout_s:g} s"
        except (aiohttp.ClientError, OSError) as error:
            return words_of(error)

    async def _watch(self, directory: EngineDirectory, engine: Engine) -> None:
        clock = asyncio.get_running_loop()
        up_s = clock.time()
        while True:
            await self._pause(engine)
            problem = await self.problem(engine)
            if problem is None:
                if engine.check_passed(self._settings.successes):
                    logger.info("%s engine %s is back", engine.role, engine.url)
            elif engine.check_failed(problem, self._settings.failures):
                logger.warning("%s engine %s is down: %s", engine.role, engine.url, problem)
            if engine.is_up:
                up_s = clock.time()
            elif not engine.listed and clock.time() - up_s > FORGET_S:
                directory.forget(engine)
                return

    async def _pause(self, engine: Engine) -> None:
        """Until the next check is due; a refused connection makes it due soon."""
        interval_s = self._settings.interval_s
        if engine.is_up:
            with suppress(TimeoutError):
                async with asyncio.timeout(None if math.isinf(interval_s) else interval_s):
                    await engine.down.wait()
        if not engine.is_up:
            await asyncio.sleep(min(DOWN_INTERVAL_S, interval_s))
