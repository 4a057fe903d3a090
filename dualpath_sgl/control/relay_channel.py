"""The relay's channel to the global scheduler: heartbeats out, nothing in.

A relay needs no scheduler to serve: engines that know it go on asking it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import zmq

from dualpath_sgl.control.link import SchedulerLink, Words
from scheduler_svc.wire.protocol import PROTOCOL_VERSION, RelayHeartbeat, RelayInfo, RelayLoad, Wire

OLDEST_VERSION = 2
"""Of the scheduler's protocol: relays came with it."""


class RelayChannel(SchedulerLink[None]):
    def __init__(
        self,
        address: str,
        relay: RelayInfo,
        load: Callable[[], RelayLoad],
        key_files: tuple[Path, Path] | None = None,
    ) -> None:
        """`load` is called on the channel's thread.  Raises KeyFileError."""
        words = Words("relay", "serves the engines that know it", "DUALPATH_RELAY_")
        super().__init__(address, words, key_files)
        self._relay = relay
        self._load = load

    def tell(self) -> None:
        """A heartbeat now: the relay drains.  From any thread, also in a signal handler."""
        self._mailbox.put(None)

    def _heartbeat(self, hello: bool) -> Wire:
        return RelayHeartbeat(
            relay=self._relay,
            load=self._load(),
            version=PROTOCOL_VERSION,
            oldest_version=OLDEST_VERSION,
            hello=hello,
        )

    def _pass_on(self, socket: zmq.Socket, order: None) -> None:
        self._beat(socket)
