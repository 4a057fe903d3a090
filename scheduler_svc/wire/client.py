"""A small synchronous client for tools and tests (the engines have their own, which never waits)."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import zmq
from msgspec.structs import replace

from scheduler_svc.wire.keys import secure_client
from scheduler_svc.wire.liveness import notice_dead_peers
from scheduler_svc.wire.protocol import (
    Error,
    Malformed,
    Place,
    Placement,
    Reply,
    Status,
    StatusRequest,
    Wire,
    decode_reply,
    encode,
)

SEND_TIMEOUT_S = 10.0

Answer = TypeVar("Answer", bound=Wire)


class SchedulerError(RuntimeError):
    """The scheduler answered with an error, or with something that cannot be read."""

    def __init__(self, problem: Error | str) -> None:
        super().__init__(problem if isinstance(problem, str) else f"{problem.code}: {problem.message}")
        self.error = None if isinstance(problem, str) else problem


class SchedulerClient:
    """One DEALER socket.  Not thread-safe.  Use as a context manager or call `close`."""

    def __init__(
        self,
        address: str,
        context: zmq.SyncContext | None = None,
        curve_key_files: tuple[Path, Path] | None = None,
    ) -> None:
        """`curve_key_files`: this client's `.key_secret` and the scheduler's `.key`.  Raises KeyFileError."""
        self._address = address
        self._socket = (context or zmq.Context.instance()).socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IPV6, int("[" in address))
        notice_dead_peers(self._socket)
        if curve_key_files is not None:
            secure_client(self._socket, *curve_key_files)
        self._socket.connect(address)

    def __enter__(self) -> SchedulerClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def status(self, timeout_s: float = 2.0) -> Status:
        """With all engines and relays, however many pages that takes.

        Raises TimeoutError when they are not answered in time, SchedulerError when the scheduler refuses or
        its answer cannot be read.
        """
        deadline_s = time.monotonic() + timeout_s
        page = self._ask(StatusRequest(), Status, timeout_s)
        engines, relays = page.engines, page.relays
        request = self._next_request(StatusRequest(), page)
        while request is not None:
            page = self._ask(request, Status, max(0.0, deadline_s - time.monotonic()))
            engines, relays = engines + page.engines, relays + page.relays
            request = self._next_request(request, page)
        return replace(page, engines=engines, relays=relays, next=None)

    @staticmethod
    def _next_request(request: StatusRequest, page: Status) -> StatusRequest | None:
        """All engines, then all relays."""
        if page.next is not None:
            return replace(request, after=page.next)
        return StatusRequest(relays=True) if page.relay_count and not request.relays else None

    def place(self, place: Place, timeout_s: float = 2.0) -> Placement:
        """Raises TimeoutError, or SchedulerError (no live engine, or the answer cannot be read)."""
        return self._ask(place, Placement, timeout_s)

    def send(self, message: Wire) -> None:
        self.send_frames(encode(message))

    def send_frames(self, *frames: bytes, timeout_s: float = SEND_TIMEOUT_S) -> None:
        """Exactly these bytes, well-formed or not.

        Raises TimeoutError when there is nobody to send them to: after a handshake between one side with
        CURVE and one without, ZeroMQ does not connect again.
        """
        if not self._socket.poll(int(timeout_s * 1000), zmq.POLLOUT):
            raise TimeoutError(f"no connection to the scheduler at {self._address} within {timeout_s:g} s")
        self._socket.send_multipart(frames)

    def receive(self, timeout_s: float) -> Reply:
        """The next message.  Raises TimeoutError, Malformed."""
        if not self._socket.poll(int(timeout_s * 1000)):
            raise TimeoutError(f"no answer from the scheduler at {self._address} within {timeout_s:g} s")
        return decode_reply(self._socket.recv())

    def _ask(self, request: Wire, answer: type[Answer], timeout_s: float) -> Answer:
        # What an earlier call that timed out left behind is not the answer to this one.
        while self._socket.poll(0):
            self._socket.recv()
        deadline_s = time.monotonic() + timeout_s
        self.send_frames(encode(request), timeout_s=timeout_s)
        while True:
            try:
                reply = self.receive(max(0.0, deadline_s - time.monotonic()))
            except Malformed as problem:
                raise SchedulerError(
                    f"its answer cannot be read ({problem}); run the same release of DualPath on both sides"
                ) from None
            if isinstance(reply, Error):
                raise SchedulerError(reply)
            if isinstance(reply, answer):
                return reply
