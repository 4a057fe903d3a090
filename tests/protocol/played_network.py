"""ZeroMQ as a world plays it: sockets that keep what was sent until it arrives, and no threads."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence

import zmq


class Frame(bytes):
    @property
    def bytes(self) -> bytes:
        return self


class Wire:
    """A socket: what was sent, and what has come."""

    def __init__(self) -> None:
        self.inbox: deque[list[bytes]] = deque()
        self.sent: deque[list[bytes]] = deque()

    def setsockopt(self, _option: int, _value: object) -> None:
        pass

    def bind_to_random_port(self, _address: str) -> int:
        return 1

    def poll(self, _timeout: int) -> bool:
        return bool(self.inbox)

    def recv_multipart(self, flags: int = 0, copy: bool = True) -> list[bytes]:
        if not self.inbox:
            raise zmq.Again
        return [Frame(part) for part in self.inbox.popleft()]

    def send(self, data: bytes, _flags: int = 0) -> None:
        self.sent.append([data])

    def send_multipart(self, parts: Sequence[bytes]) -> None:
        self.sent.append(list(parts))


class PlayedZmq:
    """The module `zmq`, whose contexts make `Wire`s."""

    class Context:
        @staticmethod
        def instance() -> type[PlayedZmq.Context]:
            return PlayedZmq.Context

        @staticmethod
        def socket(_kind: int) -> Wire:
            return Wire()

    def __getattr__(self, name: str) -> object:
        return getattr(zmq, name)


class AtOnce:
    """A thread that has run when it has started."""

    def __init__(self, target: Callable[..., None], args: Sequence[object] = (), **_named: object) -> None:
        self.start = lambda: target(*args)


class Never(AtOnce):
    """A thread that does nothing by itself."""

    def __init__(self, **_named: object) -> None:
        self.start = lambda: None


class Quiet:
    """A log that nobody reads, or whatever else has no part in what happens."""

    def __init__(self, *_anything: object, **_named: object) -> None:
        pass

    def log(self, *_anything: object) -> None:
        pass

    heard = tick = warning = info = error = log


def no_faults(what: str, *names: object, **_named: object) -> None:
    """Stands in for `faults.record`: an exception in our own code is a find."""
    raise AssertionError(f"an exception of our own: {what % names}")


SILENT = logging.getLogger("dualpath.protocol.search")
SILENT.disabled = True
