"""The command `dualpath keys`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scheduler_svc.wire.keys import PEERS, SECRET, SERVER_NAME, KeyFileError, generate

keys_app = typer.Typer(no_args_is_help=True, help="Keys for encrypted and authenticated control channels.")


@keys_app.callback()
def _group() -> None:
    """Keys for encrypted and authenticated control channels."""


@keys_app.command("generate")
def generate_command(
    directory: Annotated[Path, typer.Argument(help="Where the keys go; made if missing.")],
    peers: Annotated[list[str] | None, typer.Option("--peer", help="A peer's name; may be repeated.")] = None,
    engines: Annotated[
        str | None,
        typer.Option(help="The one peer's key speaks for these engines, e.g. prefill-0,decode-0."),
    ] = None,
) -> None:
    """Make the scheduler's key pair, unless it is there, and one for each named peer.

    An engine's peer name is its engine id: its key lets it speak for itself and for nobody else.
    """
    try:
        made = generate(directory, peers or [], engines.split(",") if engines else [])
    except KeyFileError as error:
        raise typer.BadParameter(str(error)) from None
    for path in made:
        typer.echo(path)
    typer.echo(
        f"scheduler: --curve-server-key-file {directory / (SERVER_NAME + SECRET)} "
        f"--authorized-keys-dir {directory / PEERS}"
    )
