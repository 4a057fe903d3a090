"""The engine rank's channel to the global scheduler: one thread, one DEALER socket.

Nothing here blocks a caller: `send` puts a message into a mailbox, plans arrive through a
callback on the channel's thread.  Messages are sent only over a live connection; while the
scheduler is away they are dropped and `connected` is False, so engines need not wait for a
plan that cannot come.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from pathlib import Path
from typing import Callable

import zmq
from zmq.utils.monitor import recv_monitor_message

from dualpath_sgl.mailbox import Mailbox
from scheduler_svc import protocol
from scheduler_svc.keys import secure_client
from scheduler_svc.protocol import Done, Engine, Error, ErrorCode, Heartbeat, Load, Plan, Report, Wire

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
"""The one after (re)connecting comes sooner, at random: engines that all lost the same scheduler would
otherwise report in step from then on, and plans wait behind their heartbeats."""


class ControlChannel(threading.Thread):
    def __init__(
        self,
        address: str,
        engine: Engine,
        load: Callable[[], Load],
        on_plan: Callable[[Plan], None],
        key_files: tuple[Path, Path] | None = None,
    ) -> None:
        """`key_files`: this engine's CURVE secret key and the scheduler's public one.

        Raises scheduler_svc.keys.KeyFileError when one of them is no key.
        """
        super().__init__(name="dualpath-control", daemon=True)
        self.connected = False
        self._address = address
        self._engine = engine
        self._load = load
        self._on_plan = on_plan
        socket = self._socket = zmq.Context.instance().socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.RECONNECT_IVL, 100)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        socket.setsockopt(zmq.MAXMSGSIZE, protocol.MAX_MESSAGE_BYTES)
        if key_files is not None:
            secure_client(socket, *key_files)
        self._mailbox: Mailbox[Wire] = Mailbox()
        self._stopping = threading.Event()
        # Reports without an answer, by room: sent again to a scheduler that forgot this engine.
        self._unanswered: dict[int, Report] = {}

    def send(self, message: Report | Done) -> None:
        self._mailbox.put(message)

    def describe(self, engine: Engine) -> None:
        """The engine is another one from now on; the scheduler hears of it at once."""
        self._engine = engine
        self._mailbox.put(Heartbeat(engine=engine, load=self._load()))

    def stop(self) -> None:
        self._stopping.set()
        self.join(timeout=5)

    def run(self) -> None:
        socket = self._socket
        monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        socket.connect(self._address)
        poller = zmq.Poller()
        for source in (socket, monitor, self._mailbox.fd):
            poller.register(source, zmq.POLLIN)
        next_heartbeat_s, interval_s = 0.0, HEARTBEAT_S
        try:
            while not self._stopping.is_set():
                wait_s = max(0.0, min(next_heartbeat_s - time.monotonic(), HEARTBEAT_S))
                ready = dict(poller.poll(wait_s * 1000))
                if monitor in ready:
                    self._follow_connection(monitor)
                    next_heartbeat_s, interval_s = 0.0, random.uniform(0, HEARTBEAT_S)
                if time.monotonic() >= next_heartbeat_s:
                    self._transmit(socket, Heartbeat(engine=self._engine, load=self._load()))
                    next_heartbeat_s, interval_s = time.monotonic() + interval_s, HEARTBEAT_S
                for message in self._mailbox.drain():
                    if isinstance(message, Report):
                        self._unanswered[message.room] = message
                    elif isinstance(message, Done):
                        self._unanswered.pop(message.room, None)
                    self._transmit(socket, message)
                if socket in ready:
                    self._receive(socket)
        except Exception:
            logger.exception("DualPath control channel ended; requests go on with the prefill path")
        finally:
            self.connected = False
            socket.disable_monitor()
            socket.close()

    def _follow_connection(self, monitor: zmq.Socket) -> None:
        while monitor.poll(0):
            event = recv_monitor_message(monitor)["event"]
            self.connected = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            logger.info(
                "DualPath scheduler %s: %s",
                self._address,
                "connected" if self.connected else "away, using the prefill path",
            )

    def _transmit(self, socket: zmq.Socket, message: Wire) -> None:
        try:
            socket.send(protocol.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            pass

    def _receive(self, socket: zmq.Socket) -> None:
        while socket.poll(0):
            try:
                message = protocol.decode_reply(socket.recv())
            except ValueError as error:
                logger.warning("DualPath: scheduler sent an unreadable message: %s", error)
                continue
            if isinstance(message, Plan):
                self._unanswered.pop(message.room, None)
                try:
                    self._on_plan(message)
                except Exception:
                    logger.exception("DualPath: the plan of room %d could not be used", message.room)
            elif isinstance(message, Error):
                self._handle_error(socket, message)

    def _handle_error(self, socket: zmq.Socket, error: Error) -> None:
        if error.code is ErrorCode.UNKNOWN_ENGINE and error.room in self._unanswered:
            self._transmit(socket, Heartbeat(engine=self._engine, load=self._load()))
            self._transmit(socket, self._unanswered.pop(error.room))
        else:
            logger.warning("DualPath scheduler refused a message: %s: %s", error.code, error.message)
