"""Transfer engines of the client: one for each relay, so that one that hangs holds up no other.

Mooncake makes its first contact with a peer inside a read and under a lock of its transfer engine.  A peer that
freezes just then keeps that lock for up to 60 s.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from dualpath_sgl.lanes.forward import Forwarder
from dualpath_sgl.relay.client.memory.bounce import Bounce


class Transports:
    """Of one process, for any thread.  None is ever destroyed: Mooncake's destructor holds Python for a second."""

    def __init__(self, new: Callable[[], Forwarder], bounce_bytes: int) -> None:
        self._new = new
        self.bounce = Bounce(bounce_bytes)
        self._idle: list[Forwarder] = []
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """One will be needed: what is wrong shows now.  Raises what `take` raises."""
        self.give_back(self.take())

    def take(self) -> Forwarder:
        """One that nobody else uses, and that reads into bounce memory.

        Raises OSError without so much memory, and what `new` and its `register` raise.
        """
        with self._lock:
            if self._idle:
                return self._idle.pop()
        transport = self._new()
        self.bounce.register_with(transport)
        return transport

    def give_back(self, transport: Forwarder) -> None:
        """No read of it is at its beginning; others may go on."""
        with self._lock:
            self._idle.append(transport)
