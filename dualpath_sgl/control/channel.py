"""The engine rank's channel to the global scheduler: one thread, one DEALER socket.

Nothing here blocks a caller: `send` puts a message into a mailbox, plans arrive through a
callback on the channel's thread.

    away ── connection ──> linked ── `Accepted` for a heartbeat on it ──> connected
      ^                      └── refused: logged once with the remedy, asked again every second
      └── connection lost, from either

Reports are sent while `connected` only.  Whenever no plan can come for a report any more (it was
not sent, it was refused, its connection broke) `on_no_plan` says so, so that nobody waits.

A fault in here costs the message at hand, or the connection: the thread goes on with a new one.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import zmq
from zmq.constants import Event
from zmq.utils.monitor import recv_monitor_message

from dualpath_sgl.threads import faults
from dualpath_sgl.threads.mailbox import Mailbox
from scheduler_svc.telemetry.log_limit import LimitedLog
from scheduler_svc.wire import protocol
from scheduler_svc.wire.keys import secure_client
from scheduler_svc.wire.liveness import notice_dead_peers, stop_monitor
from scheduler_svc.wire.protocol import (
    OLDEST_PEER_VERSION,
    PROTOCOL_VERSION,
    Accepted,
    Done,
    Error,
    ErrorCode,
    Heartbeat,
    Malformed,
    Plan,
    RankInfo,
    Report,
    Wire,
    Workload,
)

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
"""The one after (re)connecting comes sooner, at random: engines that all lost the same scheduler would
otherwise report in step from then on, and plans wait behind their heartbeats."""

RETRY_S = 1.0
"""Until a new socket, after a fault of ours or a refusal: ZeroMQ itself tries no more after one."""

BROKEN_HANDSHAKES = 2
"""In a row, until they count as a refusal: a scheduler breaks off with keys it does not admit, so that they
try again, but also when it is stopped."""

_HANDSHAKE_FAILED: dict[Event, str] = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: (
        "it does not admit this engine's key; put the .key file of DUALPATH_KEY_FILE into the scheduler's "
        "directory of authorized keys"
    ),
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: (
        "one side speaks CURVE and the other does not, or DUALPATH_SCHEDULER is not a scheduler's address; "
        "set DUALPATH_KEY_FILE and DUALPATH_SCHEDULER_KEY_FILE just when the scheduler has keys"
    ),
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: (
        "the handshake breaks off; the .key file of DUALPATH_KEY_FILE must be in the scheduler's directory "
        "of authorized keys, and DUALPATH_SCHEDULER_KEY_FILE the key of the scheduler at this address"
    ),
}
"""Why, and the remedy."""

_FOLLOWED = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


class ControlChannel(threading.Thread):
    def __init__(
        self,
        address: str,
        engine: RankInfo,
        key_files: tuple[Path, Path] | None = None,
    ) -> None:
        """`key_files`: this engine's CURVE secret key and the scheduler's public one.

        Raises scheduler_svc.wire.keys.KeyFileError when one of the files is no key.
        """
        super().__init__(name="dualpath-control", daemon=True)
        self.connected = False
        """The scheduler has accepted this rank on the present connection: plans can come."""
        self._address = address
        self._engine = engine
        self._last_workload = Workload()
        self._key_files = key_files
        self._refusals_said: set[object] = set()
        """Kinds of refusal that were logged since the scheduler accepted this rank last."""
        self._broken_handshakes = 0
        """In a row."""
        self._log = LimitedLog(logger)
        self._mailbox: Mailbox[Report | Done | RankInfo] = Mailbox()
        self._stopping = threading.Event()
        # Reports without an answer, by room: sent again to a scheduler that forgot this engine.
        self._unanswered: dict[int, Report] = {}
        self._socket = self._new_socket()

    def serve(
        self,
        workload: Callable[[], Workload],
        on_plan: Callable[[Plan], None],
        on_no_plan: Callable[[int], None],
    ) -> None:
        """Start the thread.  For every heartbeat it asks for the rank's `workload`.

        `on_plan` and `on_no_plan` are called on it and must not block.  `on_no_plan` gets the room of a
        report for which no plan comes any more; it may be one that is done or unknown by now.
        """
        self._workload = workload
        self._on_plan = on_plan
        self._on_no_plan = on_no_plan
        self.start()

    def send(self, message: Report | Done | RankInfo) -> None:
        """A `RankInfo` is what this rank is from now on (new weights); the scheduler hears of it at once."""
        self._mailbox.put(message)

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
        next_heartbeat_s, interval_s = 0.0, HEARTBEAT_S
        while not self._stopping.is_set():
            wait_s = max(0.0, min(next_heartbeat_s - time.monotonic(), HEARTBEAT_S))
            ready = dict(poller.poll(int(wait_s * 1000)))
            if monitor in ready:
                if self._follow_connection(monitor):
                    return
                next_heartbeat_s, interval_s = 0.0, random.uniform(0, HEARTBEAT_S)
            if time.monotonic() >= next_heartbeat_s:
                self._beat(socket)
                next_heartbeat_s, interval_s = time.monotonic() + interval_s, HEARTBEAT_S
            for message in self._mailbox.drain():
                self._pass_on(socket, message)
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
                    logger.info("DualPath scheduler %s: away, using the prefill path", self._address)
            elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                self._broken_handshakes += 1
                if self._broken_handshakes >= BROKEN_HANDSHAKES:
                    self._refused(event, _HANDSHAKE_FAILED[event])
            else:
                self._refused(event, _HANDSHAKE_FAILED[event])
                is_over = True
        return is_over

    def _lose(self) -> None:
        """What was asked on an earlier connection is not answered on this one."""
        self.connected = False
        for room in list(self._unanswered):
            self._no_plan(room)

    def _refused(self, kind: object, reason: str) -> None:
        """The scheduler is there and does not take this rank: said once, not every second."""
        self.connected = False
        if kind not in self._refusals_said:
            self._refusals_said.add(kind)
            logger.error(
                "DualPath scheduler %s refuses this engine, which uses the prefill path: %s",
                self._address,
                reason,
            )

    def _accepted(self, version: int) -> None:
        if not self.connected:
            logger.info("DualPath scheduler %s: connected, protocol version %d", self._address, version)
        self.connected = True
        self._refusals_said.clear()

    # To the scheduler

    def _beat(self, socket: zmq.Socket) -> None:
        try:
            self._last_workload = self._workload()
        except Exception:
            self._record_fault("the workload of this rank could not be told; the scheduler gets the last one")
        self._transmit(
            socket,
            Heartbeat(
                engine=self._engine,
                load=self._last_workload,
                version=PROTOCOL_VERSION,
                oldest_version=OLDEST_PEER_VERSION,
                hello=not self.connected,
            ),
        )

    def _pass_on(self, socket: zmq.Socket, message: Report | Done | RankInfo) -> None:
        if isinstance(message, RankInfo):
            self._engine = message
            self._beat(socket)
            return
        if isinstance(message, Done):
            self._unanswered.pop(message.room, None)
            self._transmit(socket, message)
            return
        self._unanswered[message.room] = message
        if not (self.connected and self._transmit(socket, message)):
            self._no_plan(message.room)

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

    # From it

    def _receive(self, socket: zmq.Socket) -> None:
        while socket.poll(0):
            try:
                message = protocol.decode_reply(socket.recv())
            except Malformed as error:
                self._log.log(logging.WARNING, "DualPath: scheduler sent an unreadable message: %s", error)
                if error.room is not None:
                    self._no_plan(error.room)
                continue
            match message:
                case Plan():
                    self._unanswered.pop(message.room, None)
                    self._call(self._on_plan, message, message.room)
                case Accepted():
                    self._accepted(message.version)
                case Error():
                    self._handle_error(socket, message)

    def _handle_error(self, socket: zmq.Socket, error: Error) -> None:
        if error.room is None:  # about a heartbeat: the only message of ours without one
            self._refused(error.code, error.message)
            return
        report = self._unanswered.pop(error.room, None)
        if report is not None and error.code is ErrorCode.UNKNOWN_ENGINE:
            self._beat(socket)
            if self._transmit(socket, report):
                return
        else:
            self._log.log(
                logging.WARNING, "DualPath scheduler refused a message: %s: %s", error.code, error.message
            )
        self._no_plan(error.room)

    def _no_plan(self, room: int) -> None:
        self._unanswered.pop(room, None)
        self._call(self._on_no_plan, room, room)

    def _call(self, callback: Callable, argument: object, room: int) -> None:
        try:
            callback(argument)
        except Exception:
            self._record_fault("the scheduler's answer about room %d could not be used", room)

    def _record_fault(self, what: str, *names: object) -> None:
        """As `faults.record`, but a flood of faults does not fill the log."""
        faults.record(what, *names, log=self._log)
