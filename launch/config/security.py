"""Who may speak to a cluster's scheduler and page servers, and what each process is given for it.

With `keys` every process gets its own, an engine those of its name.  On a
network that the user calls trusted, and on one that the launcher made on this machine, nothing is
authenticated.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, model_validator

from dualpath_sgl.launch.config.addresses import Addresses
from scheduler_svc.wire.keys import PEERS, PUBLIC, SECRET, SERVER_NAME
from scheduler_svc.wire.reach import is_loopback

ROUTER, OPERATOR = "router", "operator"
"""Peers beside the engines: a placing router; the launcher itself and `dualpath status`."""


class Security(BaseModel):
    """Exactly one of the two."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    keys: Path | None = None
    """Directory made by `dualpath keys generate`, with a key for each engine and relay, `router` and
    `operator`."""
    trusted_network: bool = False
    """Whoever reaches the cluster's addresses may do anything with it."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Security:
        if (self.keys is not None) == self.trusted_network:
            raise ValueError(
                "give either keys, a directory made by `dualpath keys generate`, or trusted_network: true"
            )
        return self

    def check(self, names: list[str]) -> None:
        """Raises ValueError when one of these peers, or the scheduler, has no keys."""
        if self.keys is None:
            return
        pairs = {name: self.keys / PEERS / name for name in names} | {SERVER_NAME: self.keys / SERVER_NAME}
        missing = [
            name
            for name, path in pairs.items()
            if not all(path.with_name(path.name + suffix).is_file() for suffix in (SECRET, PUBLIC))
        ]
        if missing:
            peers = "".join(f" --peer {name}" for name in missing if name != SERVER_NAME)
            raise ValueError(
                f"security.keys {str(self.keys)!r} lacks the keys of {', '.join(missing)}; run "
                f"dualpath keys generate {self.keys}{peers}"
            )


def key_files(security: Security | None, name: str) -> tuple[Path, Path] | None:
    """A peer's secret key and the scheduler's public one; None: nobody has keys."""
    if security is None or security.keys is None:
        return None
    keys = security.keys.absolute()
    return keys / PEERS / f"{name}{SECRET}", keys / f"{SERVER_NAME}{PUBLIC}"


def scheduler_flags(security: Security | None, addresses: Addresses) -> list[str]:
    if security is not None and security.keys is not None:
        keys = security.keys.absolute()
        return [
            f"--curve-server-key-file={keys / SERVER_NAME}{SECRET}",
            f"--authorized-keys-dir={keys / PEERS}",
        ]
    trusted = _is_trusted(security, addresses) and not is_loopback(addresses.listens("scheduler"))
    return ["--insecure-bind"] if trusted else []


def router_flags(security: Security | None) -> list[str]:
    """Options that give a placing router its keys."""
    files = key_files(security, ROUTER)
    if files is None:
        return []
    return [f"--dualpath-key-file={files[0]}", f"--dualpath-scheduler-key-file={files[1]}"]


def engine_environment(security: Security | None, addresses: Addresses, name: str) -> dict[str, str]:
    files = key_files(security, name)
    if files is not None:
        return {
            "DUALPATH_KEY_FILE": str(files[0]),
            "DUALPATH_SCHEDULER_KEY_FILE": str(files[1]),
            "DUALPATH_PEER_KEYS": str(files[0].parent),
        }
    return {"DUALPATH_TRUSTED_NETWORK": "1"} if _is_trusted(security, addresses) else {}


def relay_environment(security: Security | None, addresses: Addresses, name: str) -> dict[str, str]:
    files = key_files(security, name)
    if files is not None:
        return {
            "DUALPATH_RELAY_KEY_FILE": str(files[0]),
            "DUALPATH_RELAY_SCHEDULER_KEY_FILE": str(files[1]),
            "DUALPATH_RELAY_PEER_KEYS": str(files[0].parent),
        }
    return {"DUALPATH_RELAY_TRUSTED_NETWORK": "1"} if _is_trusted(security, addresses) else {}


def _is_trusted(security: Security | None, addresses: Addresses) -> bool:
    return addresses.on_this_host_only or (security is not None and security.trusted_network)
