"""The ROUTER loop: frames in, `Cluster.handle`, frames out.  One thread owns socket and state.

Requests come from engine ranks, relays, routers and tools (`scheduler_svc.wire.protocol`).  A rank belongs to
the connection that speaks for it, and plans go there: nobody else may speak for it until that
connection is closed or its heartbeats have stopped.  A restarted rank's old connection is closed, so
the new one is taken at once.  So it is with relays.

Nothing that happens in one step ends the loop: it is logged, counted and costs that step.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import NamedTuple, cast

import zmq

from scheduler_svc.events import Event
from scheduler_svc.ledger.engines import RankKey
from scheduler_svc.metrics import Metrics
from scheduler_svc.state import Cluster, Result
from scheduler_svc.telemetry.log_limit import LimitedLog
from scheduler_svc.waiting_places import WaitingPlaces
from scheduler_svc.wire.authenticator import sender
from scheduler_svc.wire.authorized_keys import AuthorizedKeys
from scheduler_svc.wire.connections import LOOK_S, Connections, fd_of
from scheduler_svc.wire.keys import secure_server
from scheduler_svc.wire.liveness import notice_dead_peers
from scheduler_svc.wire.protocol import (
    MAX_MESSAGE_BYTES,
    Done,
    Error,
    ErrorCode,
    Heartbeat,
    Helpers,
    Loaded,
    Malformed,
    Mode,
    Place,
    Placement,
    Plan,
    Pong,
    RelayHeartbeat,
    Report,
    Request,
    Role,
    decode_request,
    encode,
    printable,
)
from scheduler_svc.wire.reach import is_loopback

TICK_S = 0.1
"""Longest wait before expiry and the stop flag are looked at again."""

COUNT_S = 1.0
"""Thousands of engines are counted no more often than they heartbeat."""

BURST_S = 0.001
"""How long messages are handled before what they led to is sent.  Each send wakes ZeroMQ's I/O thread
if that sleeps, which costs as much as a decision; sent together, one waking serves them all.  A plan
waits no longer than this for the messages after its own."""

PLACES_S = BURST_S / 4
"""For placements while engines' messages wait."""

MAX_FRAME_BYTES = 4 * MAX_MESSAGE_BYTES
"""Beyond this the socket drops the peer's connection unread; up to it the peer gets an error."""

MOST_BYTES = 2 * MAX_FRAME_BYTES
"""Beyond this without an end of the message the connection is cut (`Connections`)."""

MAX_PEERS = 65_536
"""Connections remembered; for one that was forgotten its next message is looked at more closely again."""

ANSWER_TIMEOUT_S = 1.0
"""For the loop to come by; it does every `TICK_S`."""

MAX_ASKING = 1000
"""Who asks for a sign of life beyond this takes the place of who has waited longest."""

FAULT_PAUSE_S = 0.05
"""After a fault in the loop itself: what raises at once would otherwise fill a core and the log."""

PONG_FRAME = encode(Pong())

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


class RelayKey(NamedTuple):
    name: str


Speaker = RankKey | RelayKey
"""Who belongs to one connection."""


class Peer(NamedTuple):
    """Who is at the other end of a connection."""

    fd: int
    """The connection's file descriptor; -1 where there is none."""
    key: bytes
    """Public key (Z85); empty without CURVE."""


_Asker = tuple[bytes, Peer] | Future[Placement | Error]
"""Of a placement: a connection, or who asked over HTTP."""
_HTTP = b"http"
"""In place of a connection."""


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
        context: zmq.SyncContext | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """With a key file the context must have a `PeerAuthenticator` already; given its keys, each message
        must come from a key that is still authorized and may speak for the engine that it names.

        Raises BindRefused when the address is not local, in use or unusable, KeyFileError.
        """
        check_bind(bind, secured=curve_server_key_file is not None, insecure=insecure_bind)
        self._cluster = cluster
        self._metrics = metrics
        self._observers: tuple[Callable[[Event], None], ...] = (metrics, *observers)
        self._now_s = now_s
        self._authorized_keys = authorized_keys
        self._faults = cluster.faults
        self._faults.on_fault = lambda step: metrics.faults.labels(step).inc()
        self._log = LimitedLog(logger)
        self._peers: OrderedDict[bytes, Peer] = OrderedDict()
        """By socket identity, which is that of one connection."""
        self._owners: dict[Speaker, bytes] = {}
        """Socket identity of each live rank and relay."""
        self._askers: OrderedDict[int, bytes] = OrderedDict()
        """Socket identity of the router that wants to hear of a room."""
        self._outbox: list[tuple[bytes, bytes]] = []
        """Receivers and frames of the burst under way."""
        self._events: list[Event] = []
        self._places: WaitingPlaces[_Asker] = WaitingPlaces(self._answer_place, self._refuse_place)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        """Written when another thread has put something into `_places`."""
        self._looked_s = -TICK_S
        self._counted_s = -COUNT_S
        self._rooms_forgotten = 0
        """As the metric says."""
        self._stopping = threading.Event()
        self._asking: deque[threading.Event] = deque(maxlen=MAX_ASKING)
        self._socket = (context or zmq.Context.instance()).socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 200)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.IPV6, int("[" in bind))
        notice_dead_peers(self._socket)
        self._connections = Connections(
            self._socket, MOST_BYTES, lambda reason: metrics.refused_connections.labels(reason).inc()
        )
        try:
            if curve_server_key_file is not None:
                secure_server(self._socket, curve_server_key_file)
            self._socket.bind(bind)
        except ValueError:
            self._close()
            raise
        except zmq.ZMQError as error:
            self._close()
            raise BindRefused(
                f"cannot bind {bind}: {error.strerror}; is another scheduler running there?"
            ) from None
        self.address: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def stop(self) -> None:
        """Ask `run` to return within `TICK_S`; callable from a signal handler or another thread."""
        self._stopping.set()

    def answers(self, timeout_s: float = ANSWER_TIMEOUT_S) -> bool:
        """Whether the loop itself comes by within this time; for other threads than its own."""
        answered = threading.Event()
        self._asking.append(answered)
        return answered.wait(timeout_s)

    def place(self, place: Place, timeout_s: float = ANSWER_TIMEOUT_S) -> Placement | Error:
        """A pair for a request that came over HTTP; for other threads than the loop's.  Raises TimeoutError."""
        placed: Future[Placement | Error] = Future()
        self._places.put(placed, place, self._now_s())
        with suppress(OSError):  # it is closed: nobody will answer
            os.eventfd_write(self._wake, 1)
        return placed.result(timeout_s)

    def run(self) -> None:
        """Serve, then close the socket."""
        poller = zmq.Poller()
        poller.register(self._wake, zmq.POLLIN)
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._connections.monitor, zmq.POLLIN)
        try:
            while not self._stopping.is_set():
                try:
                    if not self._take_burst() and self._wake in dict(poller.poll(int(LOOK_S * 1000))):
                        os.eventfd_read(self._wake)
                    self._tick()
                except zmq.ContextTerminated:
                    return
                except Exception:
                    self._faults.record("the loop", "it goes on")
                    self._skip_message()
                    time.sleep(FAULT_PAUSE_S)
        finally:
            self._close()

    def _skip_message(self) -> None:
        """What is left of the one that the fault came in: its parts must not be taken for others."""
        with suppress(zmq.ZMQError):
            while self._socket.getsockopt(_MORE_PARTS):
                self._socket.recv(_AT_ONCE)

    def _close(self) -> None:
        self._connections.close()
        self._socket.close()
        os.close(self._wake)

    def _tick(self) -> None:
        """What has to be done now and then."""
        self._guarded(self._connections.tick, "looking at connections")
        now_s = self._now_s()
        if now_s - self._looked_s < TICK_S:
            return
        self._looked_s = now_s
        while self._asking:
            self._asking.popleft().set()
        self._guarded(self._expire, "expiry")
        self._guarded(self._count_rooms, "metrics")
        self._guarded(self._count_engines, "metrics")
        self._guarded(self._count_relays, "metrics")
        self._guarded(self._log.tick, "logging")
        self._guarded(self._faults.tick, "logging")

    def _tell_helpers(self) -> None:
        pushes = self._cluster.helpers_due(self._now_s())
        self._metrics.helpers_told.inc(len(pushes))
        self._push(pushes)

    def _count_engines(self) -> None:
        now_s = time.monotonic()
        if now_s - self._counted_s < COUNT_S:
            return
        self._counted_s = now_s
        counted = self._cluster.engines.by_kind()
        for role, mode in product(Role, Mode):
            self._metrics.engines.labels(role.value, mode.value).set(counted[role, mode])

    def _count_relays(self) -> None:
        told, relays = self._cluster.helping.told, self._cluster.relays
        serving = len(relays.serving())
        for state, count in (("serving", serving), ("draining", len(relays) - serving)):
            self._metrics.relays.labels(state).set(count)
        self._metrics.residents.set(self._cluster.helping.residents)
        for help_, count in told._asdict().items():
            self._metrics.prefill_engines_by_help.labels(help_).set(count)

    def _count_rooms(self) -> None:
        rooms = self._cluster.rooms
        self._metrics.rooms_open.set(rooms.open_count)
        self._metrics.rooms_forgotten.inc(rooms.forgotten_count - self._rooms_forgotten)
        self._rooms_forgotten = rooms.forgotten_count

    def _guarded(self, step: Callable[[], None], name: str) -> None:
        try:
            step()
        except Exception:
            self._faults.record(name, "it is tried again")

    def _expire(self) -> None:
        for key in self._cluster.expire(self._now_s()):
            self._owners.pop(key, None)
            self._log.log(logging.WARNING, "engine %s rank %d is gone: no heartbeat", *key)
        for name in self._cluster.expired_relays():
            self._owners.pop(RelayKey(name), None)
            self._log.log(logging.WARNING, "relay %s is gone: no heartbeat", name)

    # In

    def _take_burst(self) -> bool:
        """Handle what has come, for `BURST_S`, and send what follows; False when there was nothing to do."""
        received, places_s = bool(self._places), PLACES_S
        begun_s = now_s = time.monotonic()
        try:
            while now_s - begun_s < BURST_S:
                self._take_one()
                received = True
                now_s = time.monotonic()
        except zmq.Again:
            places_s = BURST_S
        self._take_places(places_s)
        self._guarded(self._tell_helpers, "telling who may help")
        for identity, frame in self._outbox:
            try:
                self._send(identity, frame)
            except Exception:
                self._faults.record("sending", "one message is not delivered")
        self._outbox.clear()
        self._observe()
        return received

    def _take_places(self, for_s: float) -> None:
        end_s = time.monotonic() + for_s
        while self._places and time.monotonic() < end_s:
            self._guarded(lambda: self._places.take_one(self._now_s()), "placing")

    def _take_one(self) -> None:
        """Raises zmq.Again when nothing has come."""
        socket = self._socket
        identity = socket.recv(_AT_ONCE)
        peer = self._peers.get(identity)
        if peer is None:
            first = socket.recv(copy=False)
            peer, frame = self._meet(identity, first), first.bytes
        else:
            frame = socket.recv()
        parts = 1
        while socket.getsockopt(_MORE_PARTS):  # they come together; they are not wanted, nor kept
            socket.recv()
            parts += 1
        self._connections.heard(peer.fd)
        try:
            if parts == 1:
                self._handle(identity, peer, frame)
            else:
                self._refuse(
                    identity,
                    peer,
                    ErrorCode.MALFORMED,
                    f"{parts} frames; send one frame per message on a DEALER socket",
                )
        except Exception:
            self._faults.record("handling a message", "it is refused")
            self._refuse(
                identity, peer, ErrorCode.INTERNAL, "fault in the scheduler, see its log; do not repeat"
            )

    def _meet(self, identity: bytes, frame: zmq.Frame) -> Peer:
        """What only a connection's frames tell, kept because asking each of them takes long."""
        peer = Peer(fd_of(frame), sender(frame))
        # An identity that a peer chose itself may come back with another key; ZeroMQ's own begin with 0.
        if identity.startswith(b"\0"):
            self._peers[identity] = peer
            if len(self._peers) > MAX_PEERS:
                self._peers.popitem(last=False)
        return peer

    def _handle(self, identity: bytes, peer: Peer, frame: bytes) -> None:
        try:
            message = decode_request(frame)
        except Malformed as error:
            self._refuse(identity, peer, ErrorCode.MALFORMED, str(error), error.room, error.request_id)
            return
        if self._authorized_keys is not None and (why := self._authorized_keys.refusal(peer.key, message)):
            room, request_id = getattr(message, "room", None), getattr(message, "request_id", None)
            self._refuse(identity, peer, ErrorCode.FORBIDDEN, why, room, request_id)
            return
        if isinstance(message, Place):
            self._places.put((identity, peer), message, self._now_s())
        else:
            self._serve(identity, peer, message)

    def _answer_place(self, asker: _Asker, place: Place) -> None:
        if not isinstance(asker, Future):
            self._serve(*asker, place)
            return
        try:
            result = self._cluster.handle(place, self._now_s(), _HTTP)
        except Exception as fault:
            asker.set_exception(fault)
            raise
        asker.set_result(cast("Placement | Error", result.reply))
        self._events += result.events

    def _refuse_place(self, asker: _Asker, place: Place) -> None:
        text = "more to do than the scheduler can: place by yourself, and give it a core of its own"
        if isinstance(asker, Future):
            asker.set_result(Error(code=ErrorCode.BUSY, message=text, request_id=place.request_id))
        else:
            self._refuse(*asker, ErrorCode.BUSY, text, request_id=place.request_id)

    def _serve(self, identity: bytes, peer: Peer, message: Request) -> None:
        key = _speaks_for(message)
        is_another = key is not None and self._owners.get(key, identity) != identity
        if key is not None and is_another and not self._may_speak(key, message):
            self._refuse(
                identity,
                peer,
                ErrorCode.CONFLICT,
                _is_another(key),
                getattr(message, "room", None),
            )
            return
        try:
            result = self._cluster.handle(message, self._now_s(), peer.key or identity)
        except Exception:
            self._faults.record("handling a message", "it is refused")
            self._refuse(
                identity,
                peer,
                ErrorCode.INTERNAL,
                "fault in the scheduler, see its log; do not repeat",
                getattr(message, "room", None),
                getattr(message, "request_id", None),
            )
            return
        if isinstance(result.reply, Error):
            self._metrics.errors.labels(result.reply.code.value).inc()
            self._log_refusal(peer, result.reply)
        elif key is not None:
            self._owners[key] = identity
        self._post(identity, message, result)
        self._events += result.events

    def _may_speak(self, key: Speaker, message: Request) -> bool:
        """Whether another connection than the last one may speak for the rank or relay: that one is closed.

        Ranks from before versions do not repeat what was refused: there, whoever says the same counts.
        """
        if self._is_connected(self._owners[key]):
            engines = self._cluster.engines
            return isinstance(message, Heartbeat) and engines.repeats_unversioned(message.engine)
        if isinstance(message, Heartbeat):
            # Its process may be another one by now, and then those of the engine's other ranks are gone too.
            engines = self._cluster.engines
            gone = [one for one in engines.keys_of(message.engine.engine_id) if not self._has_owner(one)]
            engines.restarted(message.engine, gone)
        return True

    def _has_owner(self, key: RankKey) -> bool:
        owner = self._owners.get(key)
        return owner is not None and self._is_connected(owner)

    def _is_connected(self, identity: bytes) -> bool:
        """Asked of the socket itself, with a message that every peer ignores."""
        try:
            self._socket.send(identity, _AT_ONCE_MORE)
            self._socket.send(PONG_FRAME, _AT_ONCE)
        except zmq.ZMQError as error:
            return error.errno != zmq.EHOSTUNREACH
        return True

    # Out

    def _post(self, identity: bytes, message: Request, result: Result) -> None:
        if isinstance(message, Place) and message.tell_loaded and isinstance(result.reply, Placement):
            self._askers[result.reply.room] = identity
            if len(self._askers) > MAX_PEERS:
                self._askers.popitem(last=False)
        if result.loaded is not None and (asker := self._askers.pop(result.loaded.room, None)) is not None:
            self._outbox.append((asker, encode(result.loaded)))
        if result.reply is not None:
            self._outbox.append((identity, encode(result.reply)))
        self._push(result.pushes)
        if result.told:
            self._push(result.told)

    def _push(self, pushes: Iterable[tuple[RankKey, Plan | Loaded | Helpers]]) -> None:
        last, frame = None, b""
        for key, pushed in pushes:
            if pushed is not last:  # every rank gets the same plan
                last, frame = pushed, encode(pushed)
            receiver = self._owners.get(key)
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
            self._log.log(logging.INFO, "undelivered %.40s...: %s", frame.decode(), error.strerror)

    def _refuse(
        self,
        identity: bytes,
        peer: Peer,
        code: ErrorCode,
        text: str,
        room: int | None = None,
        request_id: str | None = None,
    ) -> None:
        self._cluster.errors += 1
        self._metrics.errors.labels(code.value).inc()
        error = Error(code=code, message=printable(text), room=room, request_id=request_id)
        self._log_refusal(peer, error)
        self._outbox.append((identity, encode(error)))

    def _log_refusal(self, peer: Peer, error: Error) -> None:
        self._log.log(
            logging.INFO,
            "refused a message of %s: %s: %s",
            self._connections.address(peer.fd),
            error.code,
            error.message,
        )

    def _observe(self) -> None:
        for observer in self._observers:
            for event in self._events:
                try:
                    observer(event)
                except Exception:
                    self._faults.record("observing", "one event is missing in metrics or spans")
        self._events.clear()


def _is_another(key: Speaker) -> str:
    if isinstance(key, RelayKey):
        return (
            f"relay {key.name} has another live connection; give every relay a name of its own, or stop the "
            "other one"
        )
    return (
        f"engine {key.engine_id} rank {key.rank} has another live connection; give every engine an "
        "engine_id of its own, or stop the other one"
    )


def _speaks_for(message: Request) -> Speaker | None:
    """The rank or relay in whose name a message is said."""
    if isinstance(message, RelayHeartbeat):
        return RelayKey(message.relay.name)
    if isinstance(message, Heartbeat):
        return RankKey(message.engine.engine_id, message.engine.rank)
    if isinstance(message, Report | Done):
        return RankKey(message.engine_id, message.rank)
    return None
