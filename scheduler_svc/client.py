"""A small synchronous client for tools and tests (the engines have their own, which never waits)."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType

import zmq

from scheduler_svc.keys import secure_client
from scheduler_svc.protocol import (
    Error,
    Place,
    Placement,
    Reply,
    Status,
    StatusRequest,
    Wire,
    decode_reply,
    encode,
)


class SchedulerError(RuntimeError):
    """The scheduler answered with an error."""

    def __init__(self, error: Error) -> None:
        super().__init__(f"{error.code}: {error.message}")
        self.error = error


class SchedulerClient:
    """One DEALER socket.  Not thread-safe.  Use as a context manager or call `close`."""

    def __init__(
        self,
        address: str,
        context: zmq.Context | None = None,
        curve_key_files: tuple[Path, Path] | None = None,
    ) -> None:
        """`curve_key_files`: this client's `.key_secret` and the scheduler's `.key`.  Raises KeyFileError."""
        self._address = address
        self._socket = (context or zmq.Context.instance()).socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IPV6, int("[" in address))
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
        """Raises TimeoutError when no scheduler answers in time."""
        return self._ask(StatusRequest(), Status, timeout_s)

    def place(self, place: Place, timeout_s: float = 2.0) -> Placement:
        """Raises TimeoutError, or SchedulerError (no live engine)."""
        return self._ask(place, Placement, timeout_s)

    def send(self, message: Wire) -> None:
        self.send_frames(encode(message))

    def send_frames(self, *frames: bytes) -> None:
        """Exactly these bytes, well-formed or not."""
        self._socket.send_multipart(frames)

    def receive(self, timeout_s: float) -> Reply:
        """The next message.  Raises TimeoutError."""
        if not self._socket.poll(timeout_s * 1000):
            raise TimeoutError(f"no answer from the scheduler at {self._address} within {timeout_s:g} s")
        return decode_reply(self._socket.recv())

    def _ask(self, request: Wire, answer: type, timeout_s: float):
        # What an earlier call that timed out left behind is not the answer to this one.
        while self._socket.poll(0):
            self._socket.recv()
        self.send(request)
        deadline_s = time.monotonic() + timeout_s
        while True:
            reply = self.receive(max(0.0, deadline_s - time.monotonic()))
            if isinstance(reply, Error):
                raise SchedulerError(reply)
            if isinstance(reply, answer):
                return reply
