"""A small HTTP engine that fails on demand.

Not SGLang: a real engine cannot be told to refuse, to hang or to die between two chunks of one
answer, and what is tested here is what the router makes of that.  It listens on a real socket and
answers in the form of SGLang's `/generate`; the router in front of it is the real one.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from aiohttp import web

from dualpath_sgl.launch.processes.ports import FreePorts
from scheduler_svc.wire.protocol import RankInfo, Role

WAIT_S = 30.0
Behaviour = Callable[["FaultyEngine", web.Request, dict], Awaitable[web.StreamResponse]]
GENERATING = ("/generate", "/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses")
CALLED = ("/v1/models", "/v1/models/{model}", "/model_info", "/server_info", "/health_generate")
DONE = ("/flush_cache", "/abort_request", "/v1/messages/count_tokens", "/tokenize")
_ports = FreePorts("127.0.0.1")


class Room:
    """What the two engines of one request know of each other, as they do through their bootstrap."""

    def __init__(self) -> None:
        self.taken = 0
        self.both_have_it = asyncio.Event()
        self.handed_over = asyncio.Event()
        """The PE has done its part."""

    def take(self) -> None:
        self.taken += 1
        if self.taken == len(Role):
            self.both_have_it.set()


class Seen(NamedTuple):
    body: dict
    headers: dict[str, str]
    query: str


class Call(NamedTuple):
    """Anything but generating and the health checks."""

    method: str
    path_and_query: str
    headers: dict[str, str]
    content: bytes


async def answer(engine: FaultyEngine, request: web.Request, body: dict) -> web.StreamResponse:
    """As it should be: the DE waits for the PE, and its answer names it, whole or as two events."""
    room = engine.rooms[body["bootstrap_room"]]
    if engine.role is Role.PREFILL:
        room.handed_over.set()
    await room.handed_over.wait()
    if not body.get("stream"):
        return web.json_response({"text": engine.name, "meta_info": engine.meta_info})
    stream = await engine.begin_stream(request)
    for index in range(2):
        await stream.write(event({"text": engine.name, "index": 0, "chunk": index}))
    await stream.write(b"data: [DONE]\n\n")
    return stream


async def busy(engine: FaultyEngine, request: web.Request, body: dict) -> web.StreamResponse:
    return web.json_response({"error": {"message": "The request queue is full."}}, status=503)


async def broken(engine: FaultyEngine, request: web.Request, body: dict) -> web.StreamResponse:
    """After both engines have taken the request."""
    await engine.rooms[body["bootstrap_room"]].both_have_it.wait()
    return web.json_response({"error": {"message": "KV transfer failed"}}, status=500)


async def wrong_request(engine: FaultyEngine, request: web.Request, body: dict) -> web.StreamResponse:
    return web.json_response({"error": {"message": "temperature is -1"}}, status=400)


async def die(engine: FaultyEngine, request: web.Request, body: dict) -> web.StreamResponse:
    """After both engines have taken the request, before any answer."""
    await engine.rooms[body["bootstrap_room"]].both_have_it.wait()
    request.transport.abort()
    return web.Response()


async def hang(engine: FaultyEngine, request: web.Request, body: dict) -> web.StreamResponse:
    await asyncio.Event().wait()


async def die_mid_stream(engine: FaultyEngine, request: web.Request, body: dict) -> web.StreamResponse:
    stream = await engine.begin_stream(request)
    await stream.write(event({"text": "half"})[:-5])
    await asyncio.sleep(0.1)
    request.transport.abort()
    return stream


async def one_chunk_then_wait(engine: FaultyEngine, request: web.Request, body: dict) -> web.StreamResponse:
    """The second chunk comes after `release`."""
    stream = await engine.begin_stream(request)
    await stream.write(event({"chunk": 0}))
    await engine.released.wait()
    await stream.write(event({"chunk": 1}))
    return stream


async def stream_without_end(engine: FaultyEngine, request: web.Request, body: dict) -> web.StreamResponse:
    stream = await engine.begin_stream(request)
    for index in itertools.count():
        await stream.write(event({"chunk": index}))
        await asyncio.sleep(0.005)


async def fail_inside_the_stream(
    engine: FaultyEngine, request: web.Request, body: dict
) -> web.StreamResponse:
    """As SGLang says it: status 200, then an error event."""
    stream = await engine.begin_stream(request)
    await stream.write(event({"error": {"message": "out of host memory", "code": 500}}))
    return stream


async def wrong_request_inside_the_stream(
    engine: FaultyEngine, request: web.Request, body: dict
) -> web.StreamResponse:
    stream = await engine.begin_stream(request)
    await stream.write(event({"error": {"message": "prompt too long", "code": 400}}))
    return stream


def event(content: dict) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


class FaultyEngine:
    """Runs on an event loop of another thread; every public method may be called from the test."""

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop, rooms: defaultdict[int, Room]) -> None:
        """`rooms` are shared by all engines."""
        self.name = name
        self.rooms = rooms
        self.role = Role.PREFILL if name.startswith("p") else Role.DECODE
        self.port = _ports.take()
        self.url = f"http://127.0.0.1:{self.port}"
        self.meta_info: dict = {}
        self.behaviour: Behaviour = answer
        self.health: int | None = 200
        """Status of the health endpoint; None: it does not answer."""
        self.api_key: str | None = None
        """What calls must name, as with SGLang's `--api-key`."""
        self.dp_rank: int | None = None
        """As it registers."""
        self.seen: list[Seen] = []
        self.calls: list[Call] = []
        self.peers: set[tuple] = set()
        """Addresses that requests came from: one for each connection."""
        self.given_up = threading.Semaphore(0)
        """Released for each request whose connection was closed before its answer was complete."""
        self.released = asyncio.Event()
        self._loop = loop
        self._runner: web.AppRunner | None = None

    def mend(self) -> None:
        self.behaviour, self.health, self.meta_info = answer, 200, {}
        self.api_key = None
        self.seen.clear()
        self.calls.clear()
        self.peers.clear()
        self.given_up = threading.Semaphore(0)
        self._loop.call_soon_threadsafe(self.released.clear)
        self.listen()

    def listen(self) -> None:
        if self._runner is None:
            self._run(self._listen())

    def refuse(self) -> None:
        """Close every connection and the listening socket."""
        if self._runner is not None:
            self._run(self._close())

    def release(self) -> None:
        self._loop.call_soon_threadsafe(self.released.set)

    def described(self) -> RankInfo:
        """As it registers with the scheduler."""
        return RankInfo(
            engine_id=self.name,
            role=self.role,
            dp_rank=self.dp_rank,
            url=self.url,
            bootstrap_port=9000 if self.role is Role.PREFILL else None,
            page_endpoint=None if self.role is Role.PREFILL else "tcp://127.0.0.1:1",
            fingerprint="layout",
            page_size=16,
            page_bytes=1000,
        )

    def was_given_up(self) -> bool:
        """Whether the router closed a request here, waiting for that if it must."""
        return self.given_up.acquire(timeout=WAIT_S)

    async def begin_stream(self, request: web.Request) -> web.StreamResponse:
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)
        return stream

    def _run(self, work) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(WAIT_S)

    async def _listen(self) -> None:
        app = web.Application()
        app.add_routes(
            [
                *(web.post(path, self._generate) for path in GENERATING),
                web.get("/health", self._health),
                *(web.get(path, self._called) for path in CALLED),
                *(web.post(path, self._called) for path in DONE),
            ]
        )
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self.port).start()
        self._runner = runner

    async def _close(self) -> None:
        runner, self._runner = self._runner, None
        await runner.cleanup()

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.seen.append(Seen(body, dict(request.headers), request.query_string))
        self.rooms[body["bootstrap_room"]].take()
        self.peers.add(request.transport.get_extra_info("peername"))
        try:
            return await self.behaviour(self, request, body)
        except (asyncio.CancelledError, ConnectionError):
            self.given_up.release()
            raise

    async def _called(self, request: web.Request) -> web.Response:
        content = await request.read()
        self.calls.append(Call(request.method, request.path_qs, dict(request.headers), content))
        if self.api_key is not None and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return await self._health(request)

    async def _health(self, request: web.Request) -> web.Response:
        if self.health is None:
            await asyncio.Event().wait()
        return web.Response(status=self.health, text=self.name)
