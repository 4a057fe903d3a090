"""ZeroMQ CURVE keys on disk: who may talk to the scheduler and to page servers, and in whose name.

    keys/scheduler.key_secret     on the scheduler's host only
    keys/scheduler.key            its public half, on every host
    keys/peers/NAME.key_secret    on the host of that peer only
    keys/peers/NAME.key           in the directory of authorized keys: of the scheduler, and of every engine

A key speaks for the engine that its public file is named after (`scheduler_svc.wire.authorized_keys`).  One
key for several engines lies there once under each of their names.  Files have pyzmq's certificate format.
"""

from __future__ import annotations

import os
import shutil
import stat
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zmq
import zmq.auth
from zmq.utils import z85

SERVER_NAME = "scheduler"
PEERS = "peers"
PUBLIC, SECRET = ".key", ".key_secret"
HANDSHAKE_MS = 3000
"""A peer that is not admitted within this time is cut off, and may try again."""
KEY_CHARACTERS = 40
"""Length of a public or a secret key in Z85."""


class KeyFileError(ValueError):
    """A key file or directory is missing, unreadable or unsafe; says which and what to do."""


def generate(directory: Path, peers: list[str], engines: Sequence[str] = ()) -> list[Path]:
    """Make the missing key pairs; returns the secret key files made.

    The one peer's key speaks for `engines` too.  Secret files are readable by their owner only.
    Raises KeyFileError for a peer that has keys already (its name would silently change its key) or
    cannot be a file name.
    """
    peer_directory = directory / PEERS
    if engines and len(peers) != 1:
        raise KeyFileError(
            f"--engines {','.join(engines)} shares one key: give --peer once, e.g. the host's name"
        )
    for name in (*peers, *engines):
        if not name or name != Path(name).name or name.startswith("."):
            raise KeyFileError(f"peer name {name!r} is not a plain file name; use letters, digits, - and _")
        if any((peer_directory / (name + suffix)).exists() for suffix in (SECRET, PUBLIC)):
            raise KeyFileError(
                f"peer {name!r} has keys in {peer_directory}; remove them or choose another name"
            )
    peer_directory.mkdir(parents=True, exist_ok=True)
    made = []
    if not (directory / (SERVER_NAME + SECRET)).exists():
        made.append(_create(directory, SERVER_NAME))
    made += [_create(peer_directory, name) for name in dict.fromkeys(peers)]
    for engine in engines:
        if engine not in peers:
            shutil.copy(peer_directory / (peers[0] + PUBLIC), peer_directory / (engine + PUBLIC))
    return made


def _create(directory: Path, name: str) -> Path:
    # pyzmq writes the file first and leaves its mode to the umask.
    before = os.umask(0o077)
    try:
        public, secret = zmq.auth.create_certificates(directory, name)
    finally:
        os.umask(before)
    os.chmod(public, 0o644)
    return Path(secret)


def load_secret(path: Path) -> tuple[bytes, bytes]:
    """Public and secret key of a `.key_secret` file.  Raises KeyFileError."""
    try:
        public, secret = zmq.auth.load_certificate(path)
        readable_by_others = _is_readable_by_others(path.stat())
        _check_key(public)
        if secret is not None:
            _check_key(secret)
    except (OSError, ValueError, IndexError) as error:
        raise KeyFileError(f"key file {path}: {error}; make one with `dualpath keys generate`") from None
    if secret is None:
        raise KeyFileError(f"key file {path} holds no secret key; name the .key_secret file")
    if readable_by_others:
        raise KeyFileError(f"key file {path} can be read by other users; run chmod 600 {path}")
    return public, secret


def _is_readable_by_others(found: os.stat_result) -> bool:
    """Whether anybody but this process's user can read the file.

    A group of ours may, if root owns the file and we are not root: so a Kubernetes Secret reaches a pod
    that is not root (`fsGroup`, mode 0440), on a volume where nobody can change modes.
    """
    if found.st_mode & stat.S_IROTH:
        return True
    is_lent = found.st_uid == 0 != os.geteuid() and found.st_gid in (os.getegid(), *os.getgroups())
    return bool(found.st_mode & stat.S_IRGRP) and not is_lent


def load_public(path: Path) -> bytes:
    """The public key of a `.key` file.  Raises KeyFileError."""
    try:
        public = zmq.auth.load_certificate(path)[0]
        _check_key(public)
    except (OSError, ValueError, IndexError) as error:
        raise KeyFileError(f"key file {path}: {error}; copy the .key file of its owner there") from None
    return public


def _check_key(key: bytes) -> None:
    """Raises ValueError."""
    if len(key) != KEY_CHARACTERS:
        raise ValueError(f"a key has {KEY_CHARACTERS} characters, this one {len(key)}")
    try:
        z85.decode(key)
    except (KeyError, struct.error):
        raise ValueError("a key has characters of Z85 only") from None


def secure_server(socket: zmq.SyncSocket, server_key_file: Path) -> None:
    """Make a socket, not bound yet, accept CURVE only.  Who may connect is `PeerAuthenticator`'s matter."""
    socket.curve_publickey, socket.curve_secretkey = load_secret(server_key_file)
    socket.curve_server = True
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)


def secure_client(socket: zmq.Socket[Any], client_key_file: Path, server_public_key_file: Path) -> None:
    """Make a socket, not connected yet, speak CURVE to one scheduler and prove who it is.

    `client_key_file` is this peer's `.key_secret`, `server_public_key_file` the scheduler's `.key`.
    Raises KeyFileError.  A refused peer sees no connection (no `ZMQ_EVENT_HANDSHAKE_SUCCEEDED`).
    """
    socket.curve_serverkey = load_public(server_public_key_file)
    socket.curve_publickey, socket.curve_secretkey = load_secret(client_key_file)
