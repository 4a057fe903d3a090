"""How a ZeroMQ socket notices that the other end is gone, and how its monitor ends."""

from __future__ import annotations

from contextlib import suppress

import zmq

PING_S = 2.0
SILENCE_S = 5.0
"""A peer whose host died, or whose process is stopped, counts as gone this long after a ping."""
HANDSHAKE_S = 5.0
"""A connection that has not said who it is by then is closed."""


def notice_dead_peers(socket: zmq.SyncSocket) -> None:
    """Before the socket binds or connects: ZeroMQ's own pings, answered by the peer's I/O thread: a busy peer is not a dead one."""
    socket.setsockopt(zmq.HEARTBEAT_IVL, int(PING_S * 1000))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(SILENCE_S * 1000))
    socket.setsockopt(zmq.HEARTBEAT_TTL, int((PING_S + SILENCE_S) * 1000))
    socket.setsockopt(zmq.HANDSHAKE_IVL, int(HANDSHAKE_S * 1000))


def stop_monitor(socket: zmq.SyncSocket, listener: zmq.SyncSocket) -> None:
    """ZeroMQ stops telling while `listener`, the monitor that `socket` got, still listens; then that is closed.

    `disable_monitor` drops the listener first.  An event in between has no receiver: ZeroMQ's I/O thread then
    waits for one for ever, and this call for that thread, with the lock of all of Python.
    """
    with suppress(zmq.ZMQError):
        socket.monitor(None, 0)
    listener.close()
