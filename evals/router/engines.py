"""HTTP servers in the place of engines, for measuring the router: they answer `/generate` at once.

They listen on loopback, all in one process, and send heartbeats to the scheduler as engines do.
"""

from __future__ import annotations

import asyncio
from multiprocessing.connection import Connection

import orjson
from aiohttp import web

from scheduler_svc.wire.client import SchedulerClient
from scheduler_svc.wire.protocol import Heartbeat, RankInfo, Role, Workload

EVENTS = 16
"""Events in a decode engine's streamed answer, each written by itself."""
HEARTBEAT_S = 1.0
_EVENT = b'data: {"text": "word", "output_ids": [1], "meta_info": {"finish_reason": null}}\n\n'
_DONE = b"data: [DONE]\n\n"


def serve(scheduler: str, pairs: int, ready: Connection) -> None:
    """Until the process is ended.  Sends each engine's (role, URL) through `ready`, as one list."""
    asyncio.run(_serve(scheduler, pairs, ready))


async def _serve(scheduler: str, pairs: int, ready: Connection) -> None:
    urls = [(role, url) for role in Role for url in await _listen(role, pairs)]
    ready.send(urls)
    with SchedulerClient(scheduler) as client:
        while True:
            for role, url in urls:
                client.send(Heartbeat(engine=_described(role, url), load=Workload()))
            await asyncio.sleep(HEARTBEAT_S)


async def _listen(role: Role, count: int) -> list[str]:
    app = web.Application(client_max_size=2**30)
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
