"""The host that a cluster's parts bind to and are reached at: what may stand there, and its address."""

from __future__ import annotations

import errno
import ipaddress
import re
import socket

import psutil

EXAMPLE = "give one address or name of this machine, such as 127.0.0.1"
_LABEL = r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)"
_NAME = re.compile(rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*")


def checked(host: str) -> str:
    """`host` if it is written as an address or a name is.  Raises ValueError with the remedy."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        # Numbers to the end are a misspelt address, which resolvers read in ways of their own.
        if not _NAME.fullmatch(host) or host.rsplit(".", 1)[-1].isdigit():
            raise ValueError(f"is neither an address nor a name; {EXAMPLE}") from None
        return host
    if address.is_multicast or getattr(address, "scope_id", None):
        raise ValueError(f"cannot stand in a URL for one machine; {EXAMPLE}")
    return host


def local_address(host: str) -> str:
    """The address that `host` means, if this machine has it.  Raises ValueError with the remedy."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise ValueError(f"does not resolve; {EXAMPLE}") from None
    # IPv4 first: nothing in a cluster minds it.
    for family, *_, address in sorted(found, key=lambda one: one[0] != socket.AF_INET):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((address[0], 0))
                return str(address[0])
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
    raise ValueError(f"is no address of this machine; it has {', '.join(_addresses())}")


def _addresses() -> list[str]:
    """The addresses of every interface, but for those that belong to one link only."""
    found = [
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6) and "%" not in address.address
    ]
    return sorted(set(found))
