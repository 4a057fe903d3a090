"""ZeroMQ CURVE keys: who may talk to the scheduler, and how a peer knows that it is the scheduler.

    keys/scheduler.key_secret     on the scheduler's host only
    keys/scheduler.key            its public half, on every host
    keys/peers/NAME.key_secret    on the host of that peer only
    keys/peers/NAME.key           in the directory of authorized keys on the scheduler's host

Files have pyzmq's certificate format.  One peer key may be shared by all engines of a host.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Annotated

import typer
import zmq
import zmq.auth

SERVER_NAME = "scheduler"
PEERS = "peers"


class KeyFileError(ValueError):
    """A key file or directory is missing, unreadable or unsafe; says which and what to do."""


keys_app = typer.Typer(no_args_is_help=True, help="Keys for encrypted and authenticated control channels.")


@keys_app.callback()
def _group() -> None:
    """Keys for encrypted and authenticated control channels."""


@keys_app.command("generate")
def generate_command(
    directory: Annotated[Path, typer.Argument(help="Where the keys go; made if missing.")],
    peers: Annotated[list[str] | None, typer.Option("--peer", help="A peer's name; may be repeated.")] = None,
) -> None:
    """Make the scheduler's key pair, unless it is there, and one for each named peer."""
    try:
        made = generate(directory, peers or ["engine"])
    except KeyFileError as error:
        raise typer.BadParameter(str(error)) from None
    for path in made:
        typer.echo(path)
    typer.echo(
        f"scheduler: --curve-server-key-file {directory / (SERVER_NAME + '.key_secret')} "
        f"--authorized-keys-dir {directory / PEERS}"
    )


def generate(directory: Path, peers: list[str]) -> list[Path]:
    """Make the missing key pairs; returns the secret key files made.

    Secret files are readable by their owner only.  Raises KeyFileError for a peer that has keys
    already (its name would silently change its key) or cannot be a file name.
    """
    peer_directory = directory / PEERS
    for name in peers:
        if not name or name != Path(name).name or name.startswith("."):
            raise KeyFileError(f"peer name {name!r} is not a plain file name; use letters, digits, - and _")
        if (peer_directory / f"{name}.key_secret").exists() or (peer_directory / f"{name}.key").exists():
            raise KeyFileError(
                f"peer {name!r} has keys in {peer_directory}; remove them or choose another name"
            )
    peer_directory.mkdir(parents=True, exist_ok=True)
    made = []
    if not (directory / f"{SERVER_NAME}.key_secret").exists():
        made.append(_create(directory, SERVER_NAME))
    return made + [_create(peer_directory, name) for name in dict.fromkeys(peers)]


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
        readable_by_others = path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH)
    except (OSError, ValueError) as error:
        raise KeyFileError(f"key file {path}: {error}; make one with `dualpath keys generate`") from None
    if secret is None:
        raise KeyFileError(f"key file {path} holds no secret key; name the .key_secret file")
    if readable_by_others:
        raise KeyFileError(f"key file {path} can be read by other users; run chmod 600 {path}")
    return public, secret


def load_public(path: Path) -> bytes:
    """The public key of a `.key` file.  Raises KeyFileError."""
    try:
        return zmq.auth.load_certificate(path)[0]
    except (OSError, ValueError) as error:
        raise KeyFileError(f"key file {path}: {error}; copy the scheduler's .key file there") from None


def load_authorized(directory: Path) -> set[bytes]:
    """Public keys of every `.key` file in `directory`.  Raises KeyFileError, also when there is none."""
    paths = sorted(directory.glob("*.key"))
    if not paths:
        raise KeyFileError(f"authorized keys directory {directory} holds no .key file: nobody could connect")
    return {load_public(path) for path in paths}


def secure_server(socket: zmq.Socket, server_key_file: Path) -> None:
    """Make a socket, not bound yet, accept CURVE only.  Who may connect is `PeerAuthenticator`'s matter."""
    socket.curve_publickey, socket.curve_secretkey = load_secret(server_key_file)
    socket.curve_server = True


def secure_client(socket: zmq.Socket, client_key_file: Path, server_public_key_file: Path) -> None:
    """Make a socket, not connected yet, speak CURVE to one scheduler and prove who it is.

    `client_key_file` is this peer's `.key_secret`, `server_public_key_file` the scheduler's `.key`.
    Raises KeyFileError.  A refused peer sees no connection (no `ZMQ_EVENT_HANDSHAKE_SUCCEEDED`).
    """
    socket.curve_serverkey = load_public(server_public_key_file)
    socket.curve_publickey, socket.curve_secretkey = load_secret(client_key_file)
