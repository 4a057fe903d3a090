"""CURVE between the engines: page servers know which peer lanes to admit, lanes that it is their DE.

Each engine has its own secret key, and a directory with the public key of every engine
(`scheduler_svc.wire.keys`).  A page server admits the holders of the keys that lie there, also one put
there later, and nobody else; a lane takes only the holder of `<engine id>.key` for that engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import zmq

from scheduler_svc.telemetry.log_limit import LimitedLog
from scheduler_svc.wire.authenticator import PeerAuthenticator, sender
from scheduler_svc.wire.engine_names import server_id
from scheduler_svc.wire.keys import PUBLIC, load_public, load_secret, secure_server

logger = logging.getLogger(__name__)

Secure = Callable[[zmq.Socket], None]
"""Makes a socket, neither bound nor connected yet, speak CURVE."""


class PeerKeys:
    def __init__(self, key_file: Path, directory: Path) -> None:
        """`key_file`: this engine's `.key_secret`.  Raises scheduler_svc.wire.keys.KeyFileError."""
        self._key_file = key_file
        self._own = load_secret(key_file)
        self._directory = directory
        # A context of its own: ZeroMQ asks one authenticator a context, and SGLang uses the common one.
        self._context = zmq.Context()
        self._authenticator = PeerAuthenticator(directory, self._context)
        self._log = LimitedLog(logger)

    def server_socket(self) -> zmq.Socket:
        """The page server's socket, not bound yet; its peers are authenticated from now on."""
        self._authenticator.start()
        socket = self._context.socket(zmq.ROUTER)
        secure_server(socket, self._key_file)
        return socket

    def admits(self, frame: zmq.Frame) -> bool:
        """Whether the sender's key still lies in the directory; `frame` came with `copy=False`."""
        admitted = bool(self._authenticator.keys.names(sender(frame)))
        if not admitted:
            text = "DualPath page server: ignored a peer whose key was taken away"
            self._log.log(logging.WARNING, text)
        return admitted

    def towards(self, engine_id: str) -> Secure:
        """How a lane to `engine_id` is made.  Raises KeyFileError: its key lies not in the directory."""
        server = load_public(self._directory / (server_id(engine_id) + PUBLIC))
        return partial(_secure_client, self._own, server)


def _secure_client(own: tuple[bytes, bytes], server: bytes, socket: zmq.Socket) -> None:
    socket.curve_serverkey = server
    socket.curve_publickey, socket.curve_secretkey = own
