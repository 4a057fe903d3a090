"""The ROUTER loop: frames in, `Cluster.handle`, frames out.  One thread owns socket and state.

Requests come from engine ranks, routers and tools (`scheduler_svc.protocol`); plans go to the
socket identity each rank used last, so that a restarted peer gets them under its new one.
"""

from __future__ import annotations

import ipaddress
import logging
import threading
import time
from collections.abc import Callable, Sequence

import zmq

from scheduler_svc.engines import RankKey
from scheduler_svc.metrics import Metrics
from scheduler_svc.protocol import (
    MAX_MESSAGE_BYTES,
    Error,
    ErrorCode,
    Heartbeat,
    Report,
    Request,
    Wire,
    decode_request,
    encode,
)
from scheduler_svc.state import Cluster, Event, Result

TICK_S = 0.1
"""Longest wait before expiry and the stop flag are looked at again."""

BURST_MESSAGES = 1000
"""Handled between two looks at expiry and the stop flag."""

MAX_FRAME_BYTES = 4 * MAX_MESSAGE_BYTES
"""Beyond this the socket drops the peer's connection unread; up to it the peer gets an error."""

logger = logging.getLogger(__name__)


class BindRefused(ValueError):
    """The address may not be bound, or cannot be."""


def check_bind(address: str, *, insecure: bool) -> None:
    """Raise BindRefused unless only this host can reach `address` or `insecure` is set."""
    transport, _, rest = address.partition("://")
    if transport in ("ipc", "inproc") and rest:
        return
    host, _, port = rest.rpartition(":")
    if transport != "tcp" or not host or not port:
        raise BindRefused(f"bind address {address!r} is not of the form tcp://HOST:PORT or ipc://PATH")
    if not insecure and not _is_loopback(host):
        raise BindRefused(
            f"bind address {address!r} can be reached from other hosts and messages are not authenticated; "
            "bind to tcp://127.0.0.1:PORT, or pass --insecure-bind if the network is trusted"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Server:
    """Binds at once; `run` serves until `stop`."""

    def __init__(
        self,
        bind: str,
        cluster: Cluster,
        metrics: Metrics,
        *,
        observers: Sequence[Callable[[Event], None]] = (),
        insecure_bind: bool = False,
        context: zmq.Context | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises BindRefused when the address is not local, in use or unusable."""
        check_bind(bind, insecure=insecure_bind)
        self._cluster = cluster
        self._metrics = metrics
        self._observers = (metrics, *observers)
        self._now_s = now_s
        self._identities: dict[RankKey, bytes] = {}
        self._stopping = threading.Event()
        self._socket = (context or zmq.Context.instance()).socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 200)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # A peer that restarts under an explicit identity takes over from its dead connection.
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.setsockopt(zmq.IPV6, int("[" in bind))
        try:
            self._socket.bind(bind)
        except zmq.ZMQError as error:
            self._socket.close()
            raise BindRefused(
                f"cannot bind {bind}: {error.strerror}; is another scheduler running there?"
            ) from None
        self.address: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def stop(self) -> None:
        """Ask `run` to return within `TICK_S`; callable from a signal handler or another thread."""
        self._stopping.set()

    def run(self) -> None:
        """Serve, then close the socket."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        try:
            while not self._stopping.is_set():
                if poller.poll(TICK_S * 1000):
                    self._drain()
                for key in self._cluster.expire(self._now_s()):
                    logger.warning("engine %s rank %d expired: no heartbeat", *key)
                    self._identities.pop(key, None)
                self._metrics.rooms_open.set(self._cluster.rooms.open_count)
        finally:
            self._socket.close()

    def _drain(self) -> None:
        for _ in range(BURST_MESSAGES):
            try:
                identity, *frames = self._socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            try:
                self._handle(identity, frames)
            except Exception:
                logger.exception("fault while handling a message")
                self._refuse(
                    identity, ErrorCode.INTERNAL, "fault in the scheduler, see its log; do not repeat"
                )

    def _handle(self, identity: bytes, frames: list[bytes]) -> None:
        if len(frames) != 1:
            self._refuse(
                identity,
                ErrorCode.MALFORMED,
                f"{len(frames)} frames; send one frame per message on a DEALER socket",
            )
            return
        try:
            message = decode_request(frames[0])
        except ValueError as error:
            self._refuse(identity, ErrorCode.MALFORMED, str(error))
            return
        result = self._cluster.handle(message, self._now_s())
        if isinstance(result.reply, Error):
            self._metrics.errors.labels(result.reply.code.value).inc()
            logger.info("refused %s: %s", message.type, result.reply.message)
        else:
            self._learn(identity, message)
        self._send_all(identity, result)
        self._observe(result.events)

    def _learn(self, identity: bytes, message: Request) -> None:
        if isinstance(message, Heartbeat):
            self._identities[RankKey(message.engine.engine_id, message.engine.rank)] = identity
        elif isinstance(message, Report):
            self._identities[RankKey(message.engine_id, message.rank)] = identity

    def _send_all(self, identity: bytes, result: Result) -> None:
        if result.reply is not None:
            self._send(identity, result.reply)
        for key, plan in result.pushes:
            if key in self._identities:
                self._send(self._identities[key], plan)

    def _send(self, identity: bytes, message: Wire) -> None:
        try:
            self._socket.send_multipart([identity, encode(message)], zmq.DONTWAIT)
        except zmq.ZMQError as error:
            # EHOSTUNREACH: the peer is gone.  EAGAIN: it does not read; never wait for it.
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            self._metrics.undelivered.inc()
            logger.info("undelivered %s: %s", type(message).__name__, error.strerror)

    def _refuse(self, identity: bytes, code: ErrorCode, text: str) -> None:
        self._cluster.errors += 1
        self._metrics.errors.labels(code.value).inc()
        self._send(identity, Error(code=code, message=text))

    def _observe(self, events: Sequence[Event]) -> None:
        for event in events:
            for observer in self._observers:
                try:
                    observer(event)
                except Exception:
                    logger.exception("observer %r failed", observer)
