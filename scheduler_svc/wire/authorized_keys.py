"""The directory of authorized keys as it is now, and in whose name each key may speak.

A file NAME.key admits the holder of its key and lets it speak for the server NAME and its DP ranks
(`scheduler_svc.wire.engine_names`), or for the relay NAME; a key that lies there under several names speaks for all of them.
What any admitted peer may do (ask for a placement or the status, ping) is nobody's name.

One thread calls `read` again and again, others ask; what they see is replaced, never changed.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from scheduler_svc.wire.engine_names import server_id
from scheduler_svc.wire.keys import PUBLIC, KeyFileError, load_public
from scheduler_svc.wire.protocol import Heartbeat, RelayHeartbeat, Wire

logger = logging.getLogger(__name__)

Stamp = tuple[int, ...]


class AuthorizedKeys:
    def __init__(self, directory: Path) -> None:
        """Raises KeyFileError when the directory admits nobody."""
        self._directory = directory
        self._files: dict[str, tuple[Stamp, bytes | None]] = {}
        """Key of each file as it was read; None: unreadable, and said so."""
        self._names: dict[bytes, frozenset[str]] = {}
        self.read()
        if not self._names:
            raise KeyFileError(
                f"authorized keys directory {directory} holds no .key file that can be used: nobody could "
                "connect; make keys with `dualpath keys generate`"
            )

    def read(self) -> None:
        """Look at the directory again.  A file that cannot be read admits nobody, and is logged once."""
        files: dict[str, tuple[Stamp, bytes | None]] = {}
        for path in sorted(self._directory.glob(f"*{PUBLIC}")):
            known = self._files.get(path.stem)
            stamp = _stamp(path)
            files[path.stem] = known if known is not None and known[0] == stamp else (stamp, _load(path))
        names: dict[bytes, set[str]] = {}
        for name, (_, key) in files.items():
            if key is not None:
                names.setdefault(key, set()).add(name)
        self._log_changes(files)
        self._files, self._names = files, {key: frozenset(own) for key, own in names.items()}

    def names(self, key: bytes) -> frozenset[str]:
        """Names of the holder of a public key (Z85); empty: not admitted."""
        return self._names.get(key, frozenset())

    def refusal(self, key: bytes, message: Wire) -> str | None:
        """Why the holder of `key` may not say `message`; None: it may."""
        names = self.names(key)
        if not names:
            return f"this peer's key is no longer in the directory of authorized keys {self._directory}"
        return refusal(names, message)

    def _log_changes(self, files: dict[str, tuple[Stamp, bytes | None]]) -> None:
        admitted = {name for name, (_, key) in files.items() if key is not None}
        before = {name for name, (_, key) in self._files.items() if key is not None}
        for word, changed in (("admitted", admitted - before), ("no longer admitted", before - admitted)):
            if changed and self._files:
                logger.info("keys in %s: %s %s", self._directory, word, ", ".join(sorted(changed)))


def refusal(names: frozenset[str], message: Wire) -> str | None:
    """Why a peer of these names may not say `message`; None: it may."""
    if isinstance(message, RelayHeartbeat):
        name = message.relay.name
        return None if name in names else _not_its_name("name", name, names, name)
    spoken_for = message.engine if isinstance(message, Heartbeat) else message
    engine_id = getattr(spoken_for, "engine_id", None)
    if engine_id is None or (server := server_id(engine_id)) in names:
        return None
    return _not_its_name("engine_id", engine_id, names, server)


def _not_its_name(field: str, said: str, names: frozenset[str], owner: str) -> str:
    return (
        f"{field} {said} is not this key's: it speaks for {', '.join(sorted(names))}; use the key of "
        f"{owner}, or put this one into the directory of authorized keys as {owner}{PUBLIC} too"
    )


def _stamp(path: Path) -> Stamp:
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino


def _load(path: Path) -> bytes | None:
    try:
        return load_public(path)
    except KeyFileError as error:
        logger.warning("admits nobody: %s", error)
        return None
