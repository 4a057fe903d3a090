"""The ROUTER loop: frames in, `Cluster.handle`, frames out.  One thread owns socket and state.

Requests come from engine ranks, routers and tools (`scheduler_svc.protocol`); plans go to the
socket identity each rank used last, so that a restarted peer gets them under its new one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import zmq

from scheduler_svc.authenticator import sender
from scheduler_svc.authorized_keys import AuthorizedKeys
from scheduler_svc.engines import RankKey
from scheduler_svc.events import Event
from scheduler_svc.keys import secure_server
from scheduler_svc.metrics import Metrics
from scheduler_svc.protocol import (
    MAX_MESSAGE_BYTES,
    Error,
    ErrorCode,
    Heartbeat,
    Malformed,
    Report,
    Request,
    decode_request,
    encode,
    printable,
)
from scheduler_svc.reach import is_loopback
from scheduler_svc.sparse_log import SparseLog
from scheduler_svc.state import Cluster, Result

TICK_S = 0.1
"""Longest wait before expiry and the stop flag are looked at again."""

BURST_S = 0.001
"""How long messages are handled before what they led to is sent.  Each send wakes ZeroMQ's I/O thread
if that sleeps, which costs as much as a decision; sent together, one waking serves them all.  A plan
waits no longer than this for the messages after its own."""

MAX_FRAME_BYTES = 4 * MAX_MESSAGE_BYTES
"""Beyond this the socket drops the peer's connection unread; up to it the peer gets an error."""

# Plain numbers: combining pyzmq's flags anew for each frame takes as long as sending it.
_AT_ONCE = int(zmq.DONTWAIT)
_AT_ONCE_MORE = int(zmq.DONTWAIT | zmq.SNDMORE)
_MORE_PARTS = int(zmq.RCVMORE)

logger = logging.getLogger(__name__)


class BindRefused(ValueError):
    """The address may not be bound, or cannot be."""


def check_bind(address: str, *, secured: bool = False, insecure: bool = False) -> None:
    """Raise BindRefused unless only this host can reach `address`, peers are authenticated
    (`secured`), or neither is wanted (`insecure`).
    """
    transport, _, rest = address.partition("://")
    if transport == "inproc" and rest:
        return
    host, _, port = rest.rpartition(":")
    if transport != "tcp" or not host or not port:
        raise BindRefused(f"bind address {address!r} is not of the form tcp://HOST:PORT")
    if not (secured or insecure or is_loopback(host)):
        raise BindRefused(
            f"bind address {address!r} can be reached from other hosts and messages are not authenticated; "
            "give --curve-server-key-file and --authorized-keys-dir (see `dualpath keys generate`), bind to "
            "tcp://127.0.0.1:PORT, or pass --insecure-bind if the network is trusted"
        )


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
        curve_server_key_file: Path | None = None,
        authorized_keys: AuthorizedKeys | None = None,
        context: zmq.Context | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """With a key file the context must have a `PeerAuthenticator` already; given its keys, each message
        must come from a key that is still authorized and may speak for the engine that it names.

        Raises BindRefused when the address is not local, in use or unusable, KeyFileError.
        """
        check_bind(bind, secured=curve_server_key_file is not None, insecure=insecure_bind)
        self._cluster = cluster
        self._metrics = metrics
        self._observers = (metrics, *observers)
        self._now_s = now_s
        self._authorized_keys = authorized_keys
        self._forbidden = SparseLog(logger)
        self._identities: dict[RankKey, bytes] = {}
        self._outbox: list[tuple[bytes, bytes]] = []
        """Receivers and frames of the burst under way."""
        self._events: list[Event] = []
        self._stopping = threading.Event()
        self._socket = (context or zmq.Context.instance()).socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 200)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # A peer that restarts under an explicit identity takes over from its dead connection.
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.setsockopt(zmq.IPV6, int("[" in bind))
        try:
            if curve_server_key_file is not None:
                secure_server(self._socket, curve_server_key_file)
            self._socket.bind(bind)
        except ValueError:
            self._socket.close()
            raise
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
        looked_s = -TICK_S
        try:
            while not self._stopping.is_set():
                if not self._take_burst():
                    poller.poll(TICK_S * 1000)
                if self._now_s() - looked_s < TICK_S:
                    continue
                looked_s = self._now_s()
                for key in self._cluster.expire(self._now_s()):
                    logger.warning("engine %s rank %d expired: no heartbeat", *key)
                    self._identities.pop(key, None)
                self._metrics.rooms_open.set(self._cluster.rooms.open_count)
        finally:
            self._socket.close()

    def _take_burst(self) -> bool:
        """Handle what has come, for `BURST_S`, and send what follows; False when nothing has come."""
        socket, received = self._socket, False
        begun_s = now_s = time.monotonic()
        try:
            while now_s - begun_s < BURST_S:
                identity = socket.recv(_AT_ONCE)
                frame = socket.recv(copy=self._authorized_keys is None)
                key, frames = (b"", [frame]) if isinstance(frame, bytes) else (sender(frame), [frame.bytes])
                # Parts of a message come together.
                while socket.getsockopt(_MORE_PARTS):
                    frames.append(socket.recv())
                received = True
                try:
                    self._handle(identity, frames, key)
                except Exception:
                    logger.exception("fault while handling a message")
                    self._refuse(
                        identity, ErrorCode.INTERNAL, "fault in the scheduler, see its log; do not repeat"
                    )
                now_s = time.monotonic()
        except zmq.Again:
            pass
        for identity, frame in self._outbox:
            self._send(identity, frame)
        self._outbox.clear()
        self._observe()
        return received

    def _handle(self, identity: bytes, frames: list[bytes], key: bytes) -> None:
        if len(frames) != 1:
            self._refuse(
                identity,
                ErrorCode.MALFORMED,
                f"{len(frames)} frames; send one frame per message on a DEALER socket",
            )
            return
        try:
            message = decode_request(frames[0])
        except Malformed as error:
            self._refuse(identity, ErrorCode.MALFORMED, str(error), error.room, error.request_id)
            return
        if self._authorized_keys is not None and (why := self._authorized_keys.refusal(key, message)):
            self._forbidden.warning("refused %s: %s", type(message).__name__, why)
            self._refuse(identity, ErrorCode.FORBIDDEN, why)
            return
        result = self._cluster.handle(message, self._now_s())
        if isinstance(result.reply, Error):
            self._metrics.errors.labels(result.reply.code.value).inc()
            logger.info("refused %s: %s", type(message).__name__, result.reply.message)
        else:
            self._learn(identity, message)
        self._post(identity, result)
        self._events += result.events

    def _learn(self, identity: bytes, message: Request) -> None:
        if isinstance(message, Heartbeat):
            self._identities[RankKey(message.engine.engine_id, message.engine.rank)] = identity
        elif isinstance(message, Report):
            self._identities[RankKey(message.engine_id, message.rank)] = identity

    def _post(self, identity: bytes, result: Result) -> None:
        if result.reply is not None:
            self._outbox.append((identity, encode(result.reply)))
        plan, frame = None, b""
        for key, pushed in result.pushes:
            if pushed is not plan:  # every rank gets the same plan
                plan, frame = pushed, encode(pushed)
            receiver = self._identities.get(key)
            if receiver is not None:
                self._outbox.append((receiver, frame))

    def _send(self, identity: bytes, frame: bytes) -> None:
        try:
            self._socket.send(identity, _AT_ONCE_MORE)
            self._socket.send(frame, _AT_ONCE)
        except zmq.ZMQError as error:
            # EHOSTUNREACH: the peer is gone.  EAGAIN: it does not read; never wait for it.
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            self._metrics.undelivered.inc()
            logger.info("undelivered %.40s...: %s", frame.decode(), error.strerror)

    def _refuse(
        self,
        identity: bytes,
        code: ErrorCode,
        text: str,
        room: int | None = None,
        request_id: str | None = None,
    ) -> None:
        self._cluster.errors += 1
        self._metrics.errors.labels(code.value).inc()
        error = Error(code=code, message=printable(text), room=room, request_id=request_id)
        self._outbox.append((identity, encode(error)))

    def _observe(self) -> None:
        for observer in self._observers:
            for event in self._events:
                try:
                    observer(event)
                except Exception:
                    logger.exception("observer %r failed", observer)
        self._events.clear()
