"""Admits the holders of authorized keys to the CURVE sockets of a context."""

from __future__ import annotations

from pathlib import Path

import zmq
from zmq.auth.thread import ThreadAuthenticator

from scheduler_svc.keys import load_authorized


class PeerAuthenticator:
    """A thread that answers ZeroMQ's authentication requests.  Use as a context manager.

    Must be entered before the first socket of `context` binds: without it libzmq admits any key.
    """

    def __init__(self, authorized_keys_dir: Path, context: zmq.Context) -> None:
        """Raises KeyFileError unless at least one key is authorized."""
        load_authorized(authorized_keys_dir)
        self._directory = authorized_keys_dir
        self._thread = ThreadAuthenticator(context)

    def __enter__(self) -> PeerAuthenticator:
        self._thread.start()
        self._thread.configure_curve(domain="*", location=str(self._directory))
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.stop()
