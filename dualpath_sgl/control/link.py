"""A connection to the global scheduler: one thread, one DEALER socket, heartbeats.

    away ── connection ──> linked ── `Accepted` for a heartbeat on it ──> connected
      ^                      └── refused: logged once with the remedy, asked again every second
      └── connection lost, from either

Engine ranks (`channel.py`) and relays (`relay_channel.py`) say what their heartbeats are and what they do with
what they are told.  Nothing here blocks a caller.  A fault costs the message at hand, or the connection: the
thread goes on with a new one.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import zmq
from zmq.constants import Event
from zmq.utils.monitor import recv_monitor_message

from dualpath_sgl.threads import faults
from dualpath_sgl.threads.mailbox import Mailbox
from scheduler_svc.telemetry.log_limit import LimitedLog
from scheduler_svc.wire import protocol
from scheduler_svc.wire.keys import secure_client
from scheduler_svc.wire.liveness import notice_dead_peers, stop_monitor
from scheduler_svc.wire.protocol import FRESH_S, HEARTBEAT_S, Accepted, Error, Malformed, Reply, Wire

logger = logging.getLogger(__name__)

RETRY_S = 1.0
"""Until a new socket, after a fault of ours or a refusal: ZeroMQ itself tries no more after one."""

BROKEN_HANDSHAKES = 2
"""In a row, until they count as a refusal: a scheduler breaks off with keys it does not admit, so that they
try again, but also when it is stopped."""

_HANDSHAKE_FAILED: dict[Event, str] = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: (
        "it does not admit this key; put the .key file of {0}KEY_FILE into the scheduler's directory of "
        "authorized keys"
    ),
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: (
        "one side speaks CURVE and the other does not, or {0}SCHEDULER is not a scheduler's address; "
        "set {0}KEY_FILE and {0}SCHEDULER_KEY_FILE just when the scheduler has keys"
    ),
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: (
        "the handshake breaks off; the .key file of {0}KEY_FILE must be in the scheduler's directory "
        "of authorized keys, and {0}SCHEDULER_KEY_FILE the key of the scheduler at this address"
    ),
}
"""Why, and the remedy; `{0}` is the prefix of the settings."""

_FOLLOWED = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)

Order = TypeVar("Order")
"""What other threads hand over."""


class Words(NamedTuple):
    """For the log."""

    who: str
    """E.g. `engine`."""
    alone: str
    """What it does without the scheduler, e.g. `uses the prefill path`."""
    settings: str
    """Prefix of its settings."""


class SchedulerLink(threading.Thread, Generic[Order]):
    def __init__(self, address: str, words: Words, key_files: tuple[Path, Path] | None = None) -> None:
        """`key_files`: this peer's CURVE secret key and the scheduler's public one.

        Raises scheduler_svc.wire.keys.KeyFileError when one of the files is no key.
        """
        super().__init__(name="dualpath-control", daemon=True)
        self.connected = False
        """The scheduler has accepted this peer on the present connection."""
        self._address = address
        self._words = words
        self._key_files = key_files
        self._refusals_said: set[object] = set()
        """Kinds of refusal that were logged since the scheduler accepted this peer last."""
        self._broken_handshakes = 0
        """In a row."""
        self._log = LimitedLog(logger)
        self._mailbox: Mailbox[Order] = Mailbox()
        self._stopping = threading.Event()
        self._beat_s = self._next_beat_s = 0.0
        self._socket = self._new_socket()

    # What each kind of peer says and hears, on the thread.

    def _heartbeat(self, hello: bool) -> Wire:
        raise NotImplementedError

    def _pass_on(self, socket: zmq.Socket, order: Order) -> None:
        raise NotImplementedError

    def _told(self, socket: zmq.Socket, message: Reply) -> None:
        """Anything but `Accepted` and an error about a heartbeat."""

    def _unreadable(self, error: Malformed) -> None:
        """A message that came is none."""

    def _lost(self) -> None:
        """What was asked on an earlier connection is not answered on the next one."""

    # The thread

    def stop(self) -> None:
        self._stopping.set()
        self.join(timeout=5)

    def run(self) -> None:
        while True:
            try:
                self._serve(self._socket)
            except Exception:
                self._record_fault("the control channel failed; it connects anew")
            self._lose()
            stop_monitor(self._socket, self._socket.get_monitor_socket(_FOLLOWED))
            self._socket.close()
            if self._stopping.wait(RETRY_S):
                return
            try:
                self._socket = self._new_socket()
            except Exception:
                self._record_fault("the control channel cannot be opened")

    def _new_socket(self) -> zmq.Socket:
        socket: zmq.Socket = zmq.Context.instance().socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.RECONNECT_IVL, 100)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        socket.setsockopt(zmq.MAXMSGSIZE, protocol.MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.IPV6, int("[" in self._address))
        notice_dead_peers(socket)
        if self._key_files is not None:
            secure_client(socket, *self._key_files)
        return socket

    def _serve(self, socket: zmq.Socket) -> None:
        """Until it is stopped or the socket has had its last connection."""
        monitor = socket.get_monitor_socket(_FOLLOWED)
        socket.connect(self._address)
        poller = zmq.Poller()
        for source in (socket, monitor, self._mailbox.fd):
            poller.register(source, zmq.POLLIN)
        self._next_beat_s, interval_s = 0.0, HEARTBEAT_S
        while not self._stopping.is_set():
            wait_s = max(0.0, min(self._next_beat_s - time.monotonic(), HEARTBEAT_S))
            ready = dict(poller.poll(int(wait_s * 1000)))
            if monitor in ready:
                if self._follow_connection(monitor):
                    return
                # Peers that all lost the same scheduler would otherwise report in step from then on, and plans
                # wait behind their heartbeats.
                self._next_beat_s, interval_s = 0.0, random.uniform(0, HEARTBEAT_S)
            if time.monotonic() >= self._next_beat_s:
                self._beat(socket)
                self._next_beat_s, interval_s = self._beat_s + interval_s, HEARTBEAT_S
            for order in self._mailbox.drain():
                self._pass_on(socket, order)
            if socket in ready:
                self._receive(socket)
            self._log.tick()

    # Connection

    def _follow_connection(self, monitor: zmq.Socket) -> bool:
        """Returns whether the socket is of no more use."""
        is_over = False
        while monitor.poll(0):
            event = Event(recv_monitor_message(monitor)["event"])
            self._lose()
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._broken_handshakes = 0
                logger.info("DualPath scheduler %s: linked", self._address)
            elif event == zmq.EVENT_DISCONNECTED:
                if not self._broken_handshakes:
                    logger.info(
                        "DualPath scheduler %s: away; this %s %s",
                        self._address,
                        self._words.who,
                        self._words.alone,
                    )
            elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                self._broken_handshakes += 1
                if self._broken_handshakes >= BROKEN_HANDSHAKES:
                    self._refused(event, self._remedy(event))
            else:
                self._refused(event, self._remedy(event))
                is_over = True
        return is_over

    def _remedy(self, event: Event) -> str:
        return _HANDSHAKE_FAILED[event].format(self._words.settings)

    def _lose(self) -> None:
        self.connected = False
        self._lost()

    def _refused(self, kind: object, reason: str) -> None:
        """The scheduler is there and does not take this peer: said once, not every second."""
        self.connected = False
        if kind not in self._refusals_said:
            self._refusals_said.add(kind)
            logger.error(
                "DualPath scheduler %s refuses this %s, which %s: %s",
                self._address,
                self._words.who,
                self._words.alone,
                reason,
            )

    def _accepted(self, version: int) -> None:
        if not self.connected:
            logger.info("DualPath scheduler %s: connected, protocol version %d", self._address, version)
        self.connected = True
        self._refusals_said.clear()

    # Messages

    def _beat_soon(self) -> None:
        """What the last heartbeat said is no longer so."""
        if self.connected:
            self._next_beat_s = min(self._next_beat_s, self._beat_s + FRESH_S)

    def _beat(self, socket: zmq.Socket) -> None:
        self._beat_s = time.monotonic()
        self._transmit(socket, self._heartbeat(hello=not self.connected))

    def _transmit(self, socket: zmq.Socket, message: Wire) -> bool:
        """Whether it is on its way."""
        try:
            socket.send(protocol.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        except (ValueError, TypeError):
            self._record_fault("%.200r cannot be sent", message)
            return False
        return True

    def _receive(self, socket: zmq.Socket) -> None:
        while socket.poll(0):
            try:
                message = protocol.decode_reply(socket.recv())
            except Malformed as error:
                self._log.log(logging.WARNING, "DualPath: scheduler sent an unreadable message: %s", error)
                self._unreadable(error)
                continue
            if isinstance(message, Accepted):
                self._accepted(message.version)
            elif isinstance(message, Error) and message.room is None:
                # About a heartbeat: the only message without one.
                self._refused(message.code, message.message)
            else:
                self._told(socket, message)

    def _record_fault(self, what: str, *names: object) -> None:
        """As `faults.record`, but a flood of faults does not fill the log."""
        faults.record(what, *names, log=self._log)
