"""Admits the holders of authorized keys to the CURVE sockets of a context.

One thread answers ZeroMQ's authentication requests (RFC 27, ZAP) and reads the directory of keys
again, so that a key put there or taken away counts within `REREAD_S`.  A connection that stands
when its key is taken away is not cut by ZeroMQ: ask `keys` about each of its messages (`sender`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import zmq
from zmq.utils import z85

from scheduler_svc.telemetry.log_limit import LimitedLog
from scheduler_svc.wire.authorized_keys import AuthorizedKeys

REREAD_S = 1.0
STOP_MS = 100
"""How often the stop flag is looked at."""

logger = logging.getLogger(__name__)


class PeerAuthenticator:
    """A thread that answers ZeroMQ's authentication requests.  Use as a context manager.

    Must be entered before the first socket of `context` binds: without it libzmq admits any key.
    """

    def __init__(
        self,
        authorized_keys_dir: Path,
        context: zmq.SyncContext,
        on_refused: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_refused` is called, on the thread, for each connection that is refused.

        Raises KeyFileError unless at least one key is authorized.
        """
        self.keys = AuthorizedKeys(authorized_keys_dir)
        self._directory = authorized_keys_dir
        self._context = context
        self._on_refused = on_refused
        self._log = LimitedLog(logger)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dualpath-authenticator", daemon=True)

    def __enter__(self) -> PeerAuthenticator:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind("inproc://zeromq.zap.01")
        self._thread.start()

    def stop(self) -> None:
        """Idempotent, also when it was never started."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        reread_s = time.monotonic() + REREAD_S
        try:
            while not self._stopping.is_set():
                try:
                    if self._socket.poll(STOP_MS):
                        self._answer(self._socket.recv_multipart())
                    if time.monotonic() >= reread_s:
                        reread_s = time.monotonic() + REREAD_S
                        self.keys.read()
                        self._log.tick()
                except Exception:
                    if self._socket.closed or self._context.closed:
                        return
                    logger.exception("authentication: a step failed, going on")
        finally:
            self._socket.close()

    def _answer(self, request: list[bytes]) -> None:
        *route, version, request_id, _domain, address, _identity, mechanism, credential = request
        key = z85.encode(credential) if mechanism == b"CURVE" else b""
        admitted = bool(self.keys.names(key))
        # The user id travels with every message of the connection.  300 is "try again later": the peer does
        # so every `HANDSHAKE_MS`.  After 400 its ZeroMQ would never come back, and its key may come any time.
        verdict = (b"200", b"OK", key) if admitted else (b"300", b"key not authorized", b"")
        self._socket.send_multipart([*route, version, request_id, *verdict, b""])
        if not admitted:
            self._on_refused()
            text = "refused a connection from %s: its key %r is not in %s"
            arguments = address.decode(errors="replace"), key.decode(), self._directory
            self._log.log(logging.WARNING, text, *arguments)


def sender(frame: zmq.Frame) -> bytes:
    """Public key (Z85) of the peer that sent a frame received with `copy=False`; empty without CURVE."""
    try:
        return str(frame.get("User-Id")).encode()
    except zmq.ZMQError:
        return b""
