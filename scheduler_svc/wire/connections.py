"""The TCP connections of a bound ROUTER socket: who was refused, and who sends without an end.

ZeroMQ keeps the parts of a message until the last one has come, without a bound: `ZMQ_MAXMSGSIZE`
is for one part and the high-water mark counts whole messages.  So a connection that has received
`most_bytes` since the last whole message that came out of it is cut, and of all of them together the
longest ones as soon as they exceed `MOST_UNFINISHED_BYTES`; ZeroMQ then frees what they sent.  What a
connection has received the kernel tells (`TCP_INFO`); connections are looked at when the process has
grown, which costs little while nothing is wrong.

Everything runs on the socket's thread.  Only TCP on Linux; elsewhere nothing is cut.
"""

from __future__ import annotations

import logging
import mmap
import os
import socket as tcp
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import zmq
from zmq.utils.monitor import recv_monitor_message

from scheduler_svc.telemetry.log_limit import LimitedLog
from scheduler_svc.wire.addresses import authority
from scheduler_svc.wire.liveness import stop_monitor

LOOK_S = 0.02
"""How often `tick` has to be called, also while no message comes."""
LONGEST_S = 5.0
"""Between two looks at the connections."""
GROWTH_BYTES = 16 * 2**20
"""The process grows by so much before connections are looked at sooner."""
MOST_UNFINISHED_BYTES = 16 * 2**20
"""What all connections together may hold.  An empty part has two bytes on the wire and takes ZeroMQ 64."""

# Plain numbers: pyzmq's own take as long as the call.
_EVENTS, _POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)

_RECEIVED = struct.Struct("@Q")
_RECEIVED_OFFSET = 128
"""`tcpi_bytes_received` in `struct tcp_info`."""

_RESET = struct.pack("ii", 1, 0)
"""`struct linger`: closing resets the connection."""

# A key that is not authorized is `authenticator.PeerAuthenticator`'s to tell, which knows whose it is.
_REFUSALS: dict[int, tuple[str, str]] = {
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: (
        "protocol",
        "it speaks no ZeroMQ, or only one of us uses CURVE, or it has another server's key",
    ),
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: ("no_detail", "it broke off before it said who it is"),
}
"""By event.  Whose key is not admitted is `PeerAuthenticator`'s matter."""

_FOLLOWED = zmq.EVENT_ACCEPTED | zmq.EVENT_ACCEPT_FAILED | zmq.EVENT_DISCONNECTED
for _event in _REFUSALS:
    _FOLLOWED |= _event

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Connection:
    address: str
    """IP:PORT of the peer."""
    whole_bytes: int = 0
    """Received when a whole message had come out of it at the last look."""


class Connections:
    """Make it before the socket binds, and `close` it before the socket."""

    def __init__(
        self,
        socket: zmq.SyncSocket,
        most_bytes: int,
        on_refused: Callable[[str], None] = lambda kind: None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`most_bytes`: more than a peer may have under way, frames that are refused included.

        `on_refused` is told `protocol` or `no_detail` for each handshake that failed, `endless` for a
        connection that was cut and `accept` for one that could not be taken.
        """
        self._socket = socket
        self._most_bytes = most_bytes
        self._on_refused = on_refused
        self._now_s = now_s
        self._log = LimitedLog(logger)
        self.monitor = socket.get_monitor_socket(_FOLLOWED)
        """Poll it too: who left already can be told from others by its address no more."""
        self._by_fd: dict[int, _Connection] = {}
        self._heard: set[int] = set()
        self._failure: int | None = None
        """A handshake just failed: the next connection to go is the one."""
        self._memory = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        self._ticked_s = self._looked_s = now_s()
        self._bytes = self._resident_bytes()

    def close(self) -> None:
        stop_monitor(self._socket, self.monitor)
        os.close(self._memory)

    def heard(self, fd: int) -> None:
        """A whole message came over this connection (`fd_of` of its frame)."""
        self._heard.add(fd)

    def address(self, fd: int) -> str:
        """IP:PORT of the peer, for logs."""
        connection = self._by_fd.get(fd)
        return "a peer that left" if connection is None else connection.address

    def tick(self) -> None:
        """Call it after the messages that had come were taken; most calls do nothing."""
        while int(self.monitor.getsockopt(_EVENTS)) & _POLLIN:
            message = recv_monitor_message(self.monitor)
            self._follow(message["event"], message["value"])
        now_s = self._now_s()
        if now_s - self._ticked_s < LOOK_S:
            return
        self._ticked_s = now_s
        resident_bytes = self._resident_bytes()
        if now_s - self._looked_s >= LONGEST_S or resident_bytes - self._bytes > GROWTH_BYTES:
            self._look()
            self._looked_s, self._bytes = now_s, resident_bytes
        self._log.tick()

    def _resident_bytes(self) -> int:
        return int(os.pread(self._memory, 128, 0).split()[1]) * mmap.PAGESIZE

    def _follow(self, kind: int, value: int) -> None:
        """An event of the socket; `value` is a file descriptor, or an error number where there is none."""
        if kind == zmq.EVENT_ACCEPTED:
            with suppress(OSError), _borrowed(value) as connection:  # it may be gone already
                self._by_fd[value] = _Connection(_address(connection))
        elif kind == zmq.EVENT_ACCEPT_FAILED:
            self._on_refused("accept")
            self._log.log(
                logging.ERROR, "cannot take a connection: %s; raise `ulimit -n`", os.strerror(value)
            )
        elif kind in _REFUSALS:
            self._failure = kind
        elif kind == zmq.EVENT_DISCONNECTED:
            address = self.address(value)
            self._by_fd.pop(value, None)
            failure, self._failure = self._failure, None
            if failure is not None:
                reason, words = _REFUSALS[failure]
                self._on_refused(reason)
                level = logging.INFO if failure == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL else logging.WARNING
                self._log.log(level, "refused a connection from %s: %s", address, words)

    def _look(self) -> None:
        unfinished: list[tuple[int, int]] = []
        for fd, connection in self._by_fd.items():
            try:
                with _borrowed(fd) as borrowed:
                    received = _received_bytes(borrowed)
            except OSError:
                continue  # it is gone, and its event under way
            if fd in self._heard:
                connection.whole_bytes = received
            elif received > connection.whole_bytes:
                unfinished.append((received - connection.whole_bytes, fd))
        self._heard.clear()
        unfinished.sort(reverse=True)
        total = sum(size for size, _ in unfinished)
        for size, fd in unfinished:
            if size <= self._most_bytes and total <= MOST_UNFINISHED_BYTES:
                break
            total -= size
            self._cut(fd, size)

    def _cut(self, fd: int, size: int) -> None:
        address = self.address(fd)
        with suppress(OSError), _borrowed(fd) as connection:
            if _address(connection) != address:  # another connection got the number meanwhile
                return
            # ZeroMQ reads the end and closes; the peer is told at once, whatever it still sends.
            connection.setsockopt(tcp.SOL_SOCKET, tcp.SO_LINGER, _RESET)
            connection.shutdown(tcp.SHUT_RDWR)
            self._on_refused("endless")
            self._log.log(
                logging.WARNING,
                "cut the connection from %s: %d MiB came and no message ended",
                address,
                size >> 20,
            )


def fd_of(frame: zmq.Frame) -> int:
    """File descriptor of the connection that a frame received with `copy=False` came over; -1: none."""
    try:
        return frame.get(zmq.SRCFD)
    except zmq.ZMQError:
        return -1


@contextmanager
def _borrowed(fd: int) -> Iterator[tcp.socket]:
    """ZeroMQ's own descriptor, which stays open.  Raises OSError when it is no open socket."""
    connection = tcp.socket(fileno=fd)
    try:
        yield connection
    finally:
        connection.detach()


def _address(connection: tcp.socket) -> str:
    """Raises OSError when it is not connected, or no TCP."""
    try:
        host, port, *_ = connection.getpeername()
    except ValueError:
        raise OSError("no TCP") from None
    return authority(host, port)


def _received_bytes(connection: tcp.socket) -> int:
    """Raises OSError where the kernel does not say."""
    info = connection.getsockopt(tcp.IPPROTO_TCP, tcp.TCP_INFO, _RECEIVED_OFFSET + _RECEIVED.size)
    if len(info) < _RECEIVED_OFFSET + _RECEIVED.size:
        raise OSError("no tcpi_bytes_received")
    received_bytes: int = _RECEIVED.unpack_from(info, _RECEIVED_OFFSET)[0]
    return received_bytes
