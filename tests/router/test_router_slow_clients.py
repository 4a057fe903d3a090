"""Clients that are too many, or that send slowly, stop, or say nothing: the others are served, no memory is lost.

The router's application and the stand-ins for engines run in this process, on one event loop.
"""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable, Coroutine

import aiohttp
import psutil
import pytest
from aiohttp import web

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.router import engines, overload
from dualpath_sgl.evals.router.bench import Cluster
from dualpath_sgl.evals.router.engines import Work, listen
from dualpath_sgl.router import app
from dualpath_sgl.router.fleet import body
from dualpath_sgl.router.settings.settings import HealthSettings, LimitSettings, RouterSettings
from scheduler_svc.wire.descriptors import allow_many_connections
from scheduler_svc.wire.protocol import Role

CLIENTS = 300
BODY = b'{"text": "hello", "sampling_params": {"max_new_tokens": 1}}'
HEAD = b"POST /generate HTTP/1.1\r\nHost: router\r\nContent-Type: application/json\r\n"
NEVER = 1e6


def settings(
    prefill: str, decode: str, *, at_once: int, waiting: int, largest: int = 10_000
) -> RouterSettings:
    return RouterSettings(
        host="127.0.0.1", port=0, scheduler="tcp://127.0.0.1:1", key_files=None, prefill_urls=((prefill, 9000),),
        decode_urls=(decode,), engine_url_prefixes=(), request_timeout_s=NEVER, max_body_bytes=largest,
        max_retries=0, shutdown_s=0, log_level="INFO", limit=LimitSettings(at_once, waiting, NEVER),
        health=HealthSettings("/health", NEVER, 5, 1, 1), otlp_endpoint=None,
    )  # fmt: skip


class Clients:
    """Raw connections to the router."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._port = port
        self._open: list[asyncio.StreamWriter] = []

    async def say(self, what: bytes) -> asyncio.StreamReader:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(what)
        await writer.drain()
        self._open.append(writer)
        return reader

    async def leave(self) -> None:
        for writer in self._open:
            writer.close()

    async def ask(self) -> aiohttp.ClientResponse:
        async with aiohttp.ClientSession() as http, http.post(f"{self.url}/generate", data=BODY) as answer:
            await answer.read()
            return answer


def routed(
    story: Callable[[Clients], Coroutine[None, None, None]], work: Work | None = None, **limits: int
) -> None:
    """Tell it to a router in front of a prefill and a decode engine that answer at once, or after some work."""

    async def run() -> None:
        (prefill,), (decode,) = [await listen(role, 1, work) for role in (Role.PREFILL, Role.DECODE)]
        runner = web.AppRunner(
            await app.make_app(settings(prefill, decode, **limits)),
            access_log=None,
            handler_cancellation=True,
        )
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        clients = Clients(runner.addresses[0][1])
        try:
            await story(clients)
        finally:
            await clients.leave()
            await runner.cleanup()

    asyncio.run(run())


@pytest.fixture
def bodies(monkeypatch: pytest.MonkeyPatch) -> list[body.Bodies]:
    """Those of the routers that the test starts."""
    made: list[body.Bodies] = []

    class Noted(body.Bodies):
        def __init__(self, largest_bytes: int) -> None:
            super().__init__(largest_bytes, idle_s=NEVER)
            made.append(self)

    monkeypatch.setattr(app, "Bodies", Noted)
    return made


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"POST /gen", id="half a line"),
        pytest.param(HEAD, id="half a head"),
        pytest.param(HEAD + b"Content-Length: 5000\r\n\r\n", id="no body"),
        pytest.param(HEAD + b"Content-Length: 5000\r\n\r\n" + BODY, id="half a body"),
        pytest.param(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", id="no chunk"),
    ],
)
def test_hundreds_that_stop_in_the_middle_take_no_place_from_the_others(said, bodies):
    async def story(clients: Clients) -> None:
        for _ in range(CLIENTS):
            await clients.say(said)
        for _ in range(3):
            assert (await clients.ask()).status == 200

    routed(story, at_once=2, waiting=10, largest=1_000_000)


def test_more_connections_come_than_a_process_may_usually_have(own_process, bodies):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (CLIENTS, hard))
    allow_many_connections()

    async def story(clients: Clients) -> None:
        for _ in range(CLIENTS):
            await clients.say(b"")  # two descriptors here, this process being both ends
        assert (await clients.ask()).status == 200

    routed(story, at_once=1, waiting=0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


def test_what_all_bodies_take_is_bounded_and_free_again_when_their_clients_leave(bodies):
    largest = 10_000
    part = HEAD + b"Content-Length: 10000\r\n\r\n" + b"x" * 9_900

    async def story(clients: Clients) -> None:
        for _ in range(2):
            await clients.say(part)
        await until(lambda: bodies[0].held_bytes == 2 * 9_900)
        one_more = await clients.say(part)
        assert (await one_more.readline()).split()[1] == b"429"
        assert b"Retry-After: 1\r\n" in await one_more.readuntil(b"\r\n\r\n")
        await until(lambda: bodies[0].held_bytes == 2 * 9_900)
        assert (await clients.ask()).status == 200  # a small one still fits
        await clients.leave()
        await until(lambda: bodies[0].held_bytes == 0)
        assert (await clients.ask()).status == 200

    routed(story, at_once=10, waiting=10, largest=largest)


def test_a_client_that_pauses_too_long_is_told_so(monkeypatch):
    monkeypatch.setattr(app, "Bodies", lambda largest_bytes: body.Bodies(largest_bytes, idle_s=0.01))

    async def story(clients: Clients) -> None:
        slow = await clients.say(HEAD + b"Content-Length: 5000\r\n\r\n" + BODY)
        assert (await slow.readline()).split()[1] == b"408"

    routed(story, at_once=1, waiting=0)


def test_past_saturation_the_rest_is_sent_away_and_service_goes_on_afterwards(monkeypatch):
    held = asyncio.Event()

    class Held:
        """The work takes until the test says so."""

        Semaphore = asyncio.Semaphore

        @staticmethod
        async def sleep(_seconds: float) -> None:
            await held.wait()

    monkeypatch.setattr(engines, "asyncio", Held)

    async def story(clients: Clients) -> None:
        asked = [asyncio.create_task(clients.ask()) for _ in range(50)]
        while sum(one.done() for one in asked) < 46:
            await asyncio.wait([one for one in asked if not one.done()], return_when=asyncio.FIRST_COMPLETED)
        away = [one.result() for one in asked if one.done()]
        assert {answer.status for answer in away} == {429}
        assert {answer.headers["Retry-After"] for answer in away} == {"1"}
        held.set()
        answers = await asyncio.gather(*asked)
        assert sorted(answer.status for answer in answers) == [200] * 4 + [429] * 46
        assert (await clients.ask()).status == 200

    routed(story, Work(2, 1), at_once=2, waiting=2)


def test_the_measurement_counts_what_was_answered_and_what_was_sent_away():
    async def story(clients: Clients) -> None:
        router = Cluster(clients.url, {"router": psutil.Process()})
        found = await overload._offer(router, 3.0, Work(2, 0.01), 0.2)
        assert found["asked"] == 3 and 0 <= found["sent_away"] < 1 and found["answered"] > 0
        assert 1 <= found["p50"] <= found["p99"]
        with pytest.raises(EvalError, match="answers 404"):
            await overload._offer(router._replace(url=f"{clients.url}/nowhere"), 0.5, Work(2, 0.01), 0.1)

    routed(story, Work(2, 0.01), at_once=2, waiting=2)
