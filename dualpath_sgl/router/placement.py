"""The question to the scheduler: which pair of engines, and which room?

One DEALER socket on the event loop.  Nothing waits for a scheduler that is away: without a
connection the answer is `SchedulerAway` at once, and a scheduler that is connected but does not
answer in time opens a circuit.  While it is open nobody asks; a task of its own sends pings until
one is answered in time.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from pathlib import Path

import zmq
import zmq.asyncio

from scheduler_svc.wire.keys import secure_client
from scheduler_svc.wire.protocol import (
    MAX_MESSAGE_BYTES,
    Error,
    Loaded,
    Ping,
    Place,
    Placement,
    Pong,
    Wire,
    decode_reply,
    encode,
)

logger = logging.getLogger(__name__)

PLACE_TIMEOUT_S = 1.0
"""A decision takes a few milliseconds; this is what a hung scheduler costs, once."""
MOST_LOADED = 10_000
"""Rooms told of and not asked for."""
PING_INTERVAL_S = 1.0
"""While the circuit is open."""


class SchedulerAway(Exception):
    """No placement; the message is a short reason."""


class PlacementClient:
    """Use on one event loop; `close` at the end."""

    def __init__(self, address: str, key_files: tuple[Path, Path] | None) -> None:
        """`key_files`: this router's CURVE secret key and the scheduler's public one.  Raises KeyFileError."""
        self._address = address
        self._context = zmq.asyncio.Context()
        socket = self._socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        # Sent over a live connection or not at all: what waits for one would be placed for nobody.
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.RECONNECT_IVL, 100)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.IPV6, int("[" in address))
        try:
            if key_files is not None:
                secure_client(socket, *key_files)
            socket.connect(address)
        except BaseException:
            self._context.destroy()
            raise
        self._asked: dict[str, asyncio.Future[Placement]] = {}
        """By request id."""
        self._loaded: OrderedDict[int, Loaded] = OrderedDict()
        """By room, oldest first; until `loaded` takes it."""
        self._pong = asyncio.Event()
        self._reader = asyncio.create_task(self._read(), name="placement reader")
        self._pinger: asyncio.Task[None] | None = None
        """Runs while the circuit is open."""

    def close(self) -> None:
        for task in (self._reader, self._pinger):
            if task is not None:
                task.cancel()
        self._context.destroy()

    async def place(self, place: Place) -> Placement:
        """Raises SchedulerAway within PLACE_TIMEOUT_S."""
        if self._pinger is not None:
            raise SchedulerAway("scheduler does not answer")
        answer: asyncio.Future[Placement] = asyncio.get_running_loop().create_future()
        self._asked[place.request_id] = answer
        try:
            async with asyncio.timeout(PLACE_TIMEOUT_S):
                await self._send(place)
                return await answer
        except TimeoutError:
            self._open_circuit()
            raise SchedulerAway("scheduler does not answer") from None
        finally:
            del self._asked[place.request_id]

    def loaded(self, room: int) -> Loaded | None:
        """What became of a room, if the scheduler was asked to tell and has; once."""
        return self._loaded.pop(room, None)

    async def _send(self, message: Wire) -> None:
        try:
            await self._socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            raise SchedulerAway("scheduler is not connected") from None

    def _open_circuit(self) -> None:
        if self._pinger is None:
            logger.warning("scheduler %s does not answer: this router places by itself", self._address)
            self._pinger = asyncio.create_task(self._ping(), name="placement ping")

    async def _ping(self) -> None:
        """Until the scheduler answers in time."""
        while True:
            self._pong.clear()
            try:
                async with asyncio.timeout(PLACE_TIMEOUT_S):
                    await self._send(Ping())
                    await self._pong.wait()
                break
            except (TimeoutError, SchedulerAway):
                await asyncio.sleep(PING_INTERVAL_S)
        logger.info("scheduler %s answers again", self._address)
        self._pinger = None

    async def _read(self) -> None:
        while True:
            frame = await self._socket.recv()
            try:
                message = decode_reply(frame)
            except ValueError as error:
                logger.warning("scheduler sent an unreadable message: %s", error)
                continue
            match message:
                case Placement():
                    self._answer(message.request_id, message)
                case Error(request_id=str() as request_id):
                    self._answer(request_id, SchedulerAway(f"scheduler: {message.code}"))
                case Loaded():
                    self._loaded[message.room] = message
                    if len(self._loaded) > MOST_LOADED:
                        self._loaded.popitem(last=False)
                case Pong():
                    self._pong.set()
                case _:
                    logger.warning("scheduler sent something else: %.200s", message)

    def _answer(self, request_id: str, result: Placement | SchedulerAway) -> None:
        """To whoever still waits for it."""
        answer = self._asked.get(request_id)
        if answer is None or answer.done():
            return
        if isinstance(result, Placement):
            answer.set_result(result)
        else:
            answer.set_exception(result)
