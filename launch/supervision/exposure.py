"""Whether strangers may reach what listens on every address of this machine, whatever `host` says."""

from __future__ import annotations

import socket

import psutil

from scheduler_svc.wire.reach import is_private


def public_addresses() -> list[str]:
    """Addresses of this machine that are neither private, link-local nor loopback."""
    found = {
        address.address.partition("%")[0]
        for interface in psutil.net_if_addrs().values()
        for address in interface
        if address.family in (socket.AF_INET, socket.AF_INET6)
    }
    return sorted(address for address in found if not is_private(address))


def warning(addresses: list[str]) -> str | None:
    """What to tell whoever starts Mooncake on a machine with these public addresses; None without any."""
    if not addresses:
        return None
    return (
        f"WARNING: this machine has addresses that are not private: {', '.join(addresses)}. Mooncake listens "
        "on all of them, whatever `host` is: whoever reaches its ports reads and writes the KV of every "
        "request and can end engines. Close them with a firewall: docs/security.md"
    )
