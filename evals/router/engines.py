"""HTTP servers in the place of engines, for measuring the router: they answer `/generate` at once, or after some work.

They listen on loopback, all in one process, and send heartbeats to the scheduler as engines do.
"""

from __future__ import annotations

import asyncio
from multiprocessing.connection import Connection
from typing import NamedTuple

import orjson
from aiohttp import web

from scheduler_svc.wire.client import SchedulerClient
from scheduler_svc.wire.protocol import Heartbeat, RankInfo, Role, Workload

EVENTS = 16
"""Events in a decode engine's streamed answer, each written by itself."""
HEARTBEAT_S = 1.0
_EVENT = b'data: {"text": "word", "output_ids": [1], "meta_info": {"finish_reason": null}}\n\n'
_DONE = b"data: [DONE]\n\n"


class Work(NamedTuple):
    """Of all decode engines together."""

    at_once: int
    """More requests than that wait in their engine."""
    took_s: float
    """One request's."""

    @property
    def requests_per_s(self) -> float:
        return self.at_once / self.took_s


WORK: web.AppKey[Work] = web.AppKey("work")
SLOTS: web.AppKey[asyncio.Semaphore] = web.AppKey("slots")


def serve(scheduler: str, pairs: int, ready: Connection, work: Work | None = None) -> None:
    """Until the process is ended.  Sends each engine's (role, URL) through `ready`, as one list."""
    asyncio.run(_serve(scheduler, pairs, ready, work))


async def _serve(scheduler: str, pairs: int, ready: Connection, work: Work | None) -> None:
    urls = [(role, url) for role in Role for url in await listen(role, pairs, work)]
    ready.send(urls)
    with SchedulerClient(scheduler) as client:
        while True:
            for role, url in urls:
                client.send(Heartbeat(engine=_described(role, url), load=Workload()))
            await asyncio.sleep(HEARTBEAT_S)


async def listen(role: Role, count: int, work: Work | None = None) -> list[str]:
    """URLs of so many engines, which answer at once without `work`."""
    app = web.Application(client_max_size=2**30)
    if work is not None:
        app[WORK], app[SLOTS] = work, asyncio.Semaphore(work.at_once)
    generate = _prefill if role is Role.PREFILL else _decode
    app.add_routes([web.post("/generate", generate), web.get("/health", _health)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    for _ in range(count):
        await web.TCPSite(runner, "127.0.0.1", 0).start()
    return [f"http://{host}:{port}" for host, port in runner.addresses]


async def _health(request: web.Request) -> web.Response:
    return web.Response()


async def _prefill(request: web.Request) -> web.Response:
    """A stream of a single event, or a whole answer."""
    if orjson.loads(await request.read()).get("stream"):
        return web.Response(body=_EVENT + _DONE, content_type="text/event-stream")
    return web.json_response({"text": "word"})


async def _decode(request: web.Request) -> web.StreamResponse:
    if (work := request.app.get(WORK)) is not None:
        async with request.app[SLOTS]:
            await asyncio.sleep(work.took_s)
    if not orjson.loads(await request.read()).get("stream"):
        return web.json_response({"text": "word " * EVENTS})
    stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await stream.prepare(request)
    for _ in range(EVENTS):
        await stream.write(_EVENT)
    await stream.write(_DONE)
    return stream


def _described(role: Role, url: str) -> RankInfo:
    return RankInfo(
        engine_id=url,
        role=role,
        url=url,
        bootstrap_port=9000 if role is Role.PREFILL else None,
        page_endpoint="tcp://127.0.0.1:1" if role is Role.DECODE else None,
        fingerprint="stand-in",
        page_size=64,
        page_bytes=1,
    )
