"""A bound socket that others ask: one ZeroMQ ROUTER, with CURVE where engines have keys.

It takes care of who may speak, of connections that send without an end, and of messages that are none.  What
messages mean is its owner's matter.  For one thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import zmq

from dualpath_sgl.lanes.peer_keys import PeerKeys
from scheduler_svc.telemetry.log_limit import LimitedLog
from scheduler_svc.wire.addresses import in_url, is_ipv6
from scheduler_svc.wire.connections import Connections, fd_of
from scheduler_svc.wire.liveness import notice_dead_peers
from scheduler_svc.wire.protocol import Wire, encode

logger = logging.getLogger(__name__)

LINGER_MS = 200
"""Of answers, when it is closed."""
MESSAGES_AT_A_TIME = 256
"""Then its owner has a turn, however many messages wait."""

T = TypeVar("T")


class BindRefused(ValueError):
    """The address cannot be bound."""


class Door(Generic[T]):
    def __init__(
        self,
        host: str,
        port: int,
        decode: Callable[[bytes], T],
        most_bytes: int,
        keys: PeerKeys | None = None,
        on_malformed: Callable[[], None] = lambda: None,
        on_refused: Callable[[str], None] = lambda kind: None,
    ) -> None:
        """Binds at once; port 0 takes a free one.  With `keys` only the holders of those are heard.

        `decode` raises ValueError for a frame that is no message; `most_bytes` is the longest frame.
        `on_refused`: as of `Connections`.  Raises BindRefused.
        """
        self._decode = decode
        self._keys = keys
        self._on_malformed = on_malformed
        self._log = LimitedLog(logger)
        self._socket = keys.server_socket() if keys else zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, 2 * most_bytes)
        self._socket.setsockopt(zmq.IPV6, int(is_ipv6(host)))
        notice_dead_peers(self._socket)
        self._connections = Connections(self._socket, 4 * most_bytes, on_refused)
        try:
            self._socket.bind(f"tcp://{in_url(host)}:{port or '*'}")
        except zmq.ZMQError as error:
            self.close()
            raise BindRefused(
                f"cannot bind port {port} of {host}: {error.strerror}; is another process there?"
            ) from None
        self.endpoint: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def watch(self, poller: zmq.Poller) -> None:
        """Let `poller` wake up when there is something to receive."""
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._connections.monitor, zmq.POLLIN)

    def receive(self) -> Iterator[tuple[bytes, T]]:
        """`(who, message)` of what has come, up to a limit."""
        for _ in range(MESSAGES_AT_A_TIME):
            if not self._socket.poll(0):
                return
            sender, *frames = self._socket.recv_multipart(copy=False)
            self._connections.heard(fd_of(sender))
            if self._keys is not None and not self._keys.admits(sender):
                continue
            try:
                message = self._decode(b"".join(frame.bytes for frame in frames))
            except ValueError as error:
                self._on_malformed()
                self._log.log(logging.WARNING, "ignored a malformed message: %s", error)
                continue
            yield sender.bytes, message

    def send(self, who: bytes, message: Wire) -> bool:
        """False when their connection is gone."""
        try:
            self._socket.send_multipart([who, encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return False
            if error.errno != zmq.EAGAIN:
                raise
            self._log.log(logging.WARNING, "a client takes no messages; one is lost")
        return True

    def tick(self) -> None:
        """To be called some fifty times a second."""
        self._connections.tick()
        self._log.tick()

    def close(self) -> None:
        self._connections.close()
        self._socket.close()
