"""The engine rank's channel to the global scheduler: reports out, plans and relays in.

Nothing here blocks a caller: `send` puts a message into a mailbox, plans arrive through a
callback on the channel's thread.

Reports are sent while `connected` only.  Whenever no plan can come for a report any more (it was
not sent, it was refused, its connection broke) `on_no_plan` says so, so that nobody waits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import zmq

from dualpath_sgl.control.link import SchedulerLink, Words
from scheduler_svc.wire.protocol import (
    LEADER_RANK,
    OLDEST_PEER_VERSION,
    PROTOCOL_VERSION,
    Done,
    Error,
    ErrorCode,
    Heartbeat,
    Helpers,
    Loaded,
    Malformed,
    Plan,
    RankInfo,
    Reply,
    Report,
    Wire,
    Workload,
)

PREFILL_PATH = "uses the prefill path"


class ControlChannel(SchedulerLink[Report | Done | RankInfo | None]):
    def __init__(
        self,
        address: str,
        engine: RankInfo,
        key_files: tuple[Path, Path] | None = None,
        alone: str = PREFILL_PATH,
    ) -> None:
        """`key_files`: this engine's CURVE secret key and the scheduler's public one.  `alone`: what the engine
        does without the scheduler, for the log.

        Raises scheduler_svc.wire.keys.KeyFileError when one of the files is no key.
        """
        super().__init__(address, Words("engine", alone, "DUALPATH_"), key_files)
        self._engine = engine
        self._last_workload = Workload()
        # Reports without an answer, by room: sent again to a scheduler that forgot this engine.
        self._unanswered: dict[int, Report] = {}

    def serve(
        self,
        workload: Callable[[], Workload],
        on_plan: Callable[[Plan], None],
        on_no_plan: Callable[[int], None],
        on_helpers: Callable[[Helpers], None] = lambda helpers: None,
        on_loaded: Callable[[Loaded], None] = lambda loaded: None,
    ) -> None:
        """Start the thread.  For every heartbeat it asks for the rank's `workload`.

        The others are called on it and must not block.  `on_no_plan` gets the room of a report for which no
        plan comes any more; it may be one that is done or unknown by now.  `on_helpers` gets the relays that
        may help, and no others, until it is called again.  `on_loaded` gets what became of a room whose report
        asked for it.
        """
        self._workload = workload
        self._on_plan = on_plan
        self._on_no_plan = on_no_plan
        self._on_helpers = on_helpers
        self._on_loaded = on_loaded
        self.start()

    def send(self, message: Report | Done | RankInfo) -> None:
        """A `RankInfo` is what this rank is from now on (new weights); the scheduler hears of it at once."""
        self._mailbox.put(message)

    def left(self) -> None:
        """A request has left this rank: the scheduler hears soon how much is left.  From any thread."""
        if self._engine.rank == LEADER_RANK:
            self._mailbox.put(None)

    def _lost(self) -> None:
        for room in list(self._unanswered):
            self._no_plan(room)

    def _heartbeat(self, hello: bool) -> Wire:
        try:
            self._last_workload = self._workload()
        except Exception:
            self._record_fault("the workload of this rank could not be told; the scheduler gets the last one")
        return Heartbeat(
            engine=self._engine,
            load=self._last_workload,
            version=PROTOCOL_VERSION,
            oldest_version=OLDEST_PEER_VERSION,
            hello=hello,
        )

    def _pass_on(self, socket: zmq.Socket, order: Report | Done | RankInfo | None) -> None:
        if order is None:
            self._beat_soon()
            return
        if isinstance(order, RankInfo):
            self._engine = order
            self._beat(socket)
            return
        if isinstance(order, Done):
            self._unanswered.pop(order.room, None)
            self._transmit(socket, order)
            return
        self._unanswered[order.room] = order
        if not (self.connected and self._transmit(socket, order)):
            self._no_plan(order.room)

    def _told(self, socket: zmq.Socket, message: Reply) -> None:
        match message:
            case Plan():
                self._unanswered.pop(message.room, None)
                self._call(self._on_plan, message, message.room)
            case Loaded():
                self._call(self._on_loaded, message, message.room)
            case Helpers():
                try:
                    self._on_helpers(message)
                except Exception:
                    self._record_fault("what the scheduler says of relays could not be used")
            case Error():
                self._handle_error(socket, message)

    def _unreadable(self, error: Malformed) -> None:
        if error.room is not None:
            self._no_plan(error.room)

    def _handle_error(self, socket: zmq.Socket, error: Error) -> None:
        """About a report or a done."""
        assert error.room is not None
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
