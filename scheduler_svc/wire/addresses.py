"""Addresses that peers tell each other: an engine's HTTP server and its page server.

Routers post users' prompts to the first and prefill engines connect to the second, so an address
is a scheme, a host and a port and nothing else: no path that could choose what is called, no
user, query or fragment, no character that could end a line of a log or a header.
"""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache

MOST_REMEMBERED = 16_384
"""Addresses that were found good; they come with every heartbeat and plan."""

_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST = rf"\[[0-9A-Fa-f:.]+\]|{_LABEL}(?:\.{_LABEL})*\.?"
_ADDRESS = re.compile(rf"(?P<scheme>[a-z]+)://(?P<host>{_HOST})(?::(?P<port>[0-9]{{1,5}}))?")
_NUMERIC = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")


def authority(address: str, port: int) -> str:
    """`address:port` as it stands in a URL."""
    return f"{in_url(address)}:{port}"


def in_url(address: str) -> str:
    """An IPv6 address in brackets, any other host as it is."""
    return f"[{address}]" if is_ipv6(address) else address


def is_ipv6(address: str) -> bool:
    return ":" in address


@lru_cache(MOST_REMEMBERED)
def check_http_url(url: str) -> None:
    """Raise ValueError unless `url` is `http://HOST[:PORT]` or `https://HOST[:PORT]`."""
    if not _is_address(url, ("http", "https"), needs_port=False):
        raise ValueError(
            f"url {url[:120]!r} is not http://HOST:PORT or https://HOST:PORT; give host (IPv6 in brackets) "
            "and port from 1 to 65535, and nothing after them"
        )


@lru_cache(MOST_REMEMBERED)
def check_endpoint(endpoint: str) -> None:
    """Raise ValueError unless `endpoint` is `tcp://HOST:PORT`."""
    if not _is_address(endpoint, ("tcp",), needs_port=True):
        raise ValueError(
            f"endpoint {endpoint[:120]!r} is not tcp://HOST:PORT; give host (IPv6 in brackets) and port from "
            "1 to 65535, and nothing after them"
        )


def _is_address(text: str, schemes: tuple[str, ...], *, needs_port: bool) -> bool:
    found = _ADDRESS.fullmatch(text)
    if found is None or found["scheme"] not in schemes:
        return False
    port = found["port"]
    if port is None:
        return not needs_port and _is_host(found["host"])
    return 1 <= int(port) <= 65535 and _is_host(found["host"])


def _is_host(host: str) -> bool:
    """Names are not looked up.  What looks like a number must be an address: `127.1` is one to some."""
    try:
        if host.startswith("["):
            ipaddress.IPv6Address(host[1:-1])
        elif _NUMERIC.fullmatch(host.rstrip(".").rpartition(".")[2]):
            ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return True
