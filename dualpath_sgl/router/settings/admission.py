"""Which engines get requests, and with them the clients' prompts, cookies and keys.

The scheduler passes on what engines say of themselves, so a stranger who reaches it can name any URL.  An
engine is therefore contacted only when the router's own options admit it: those listed exactly as they are
(`--prefill`, `--decode`), others by a prefix (`--dualpath-engine-url-prefix`).  URLs are compared by
their parts, and what is contacted is put together from the parts that were compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import NamedTuple

HOST = r"(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])"
PORT = r"(?::(?P<port>[0-9]{1,5}))?"
PATH = r"(?P<path>(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9._~-]+)*)/?"
"""No `.` or `..`, nothing escaped and no empty part: nothing that an HTTP client would rewrite."""
_URL = re.compile(rf"(?i:(?P<scheme>https?))://{HOST}{PORT}{PATH}")
_NETWORK = re.compile(
    r"(?i:(?P<scheme>https?))://(?:(?P<v4>[0-9.]+/[0-9]{1,2})|\[(?P<v6>[0-9A-Fa-f:.]+/[0-9]{1,3})\])"
    rf":(?P<port>[0-9]{{1,5}}){PATH}"
)
_DEFAULT_PORTS = {"http": 80, "https": 443}


class EngineUrl(NamedTuple):
    """An engine's HTTP address; equal ones are the same address, however they were written."""

    scheme: str
    host: str
    """Lower case; an IPv6 address in brackets, in its shortest form."""
    port: int
    path: str
    """Without a slash at its end; mostly empty."""

    @classmethod
    def parse(cls, url: str) -> EngineUrl:
        """Raises ValueError: user names, queries, fragments and escapes are refused."""
        found = _URL.fullmatch(url)
        if found is None:
            raise ValueError(
                f"{url!r} is no engine's address; give http://HOST:PORT (or https) without user, query or "
                "fragment"
            )
        scheme = found["scheme"].lower()
        return cls(scheme, _host(found["host"]), _port(found["port"], scheme), found["path"])

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}:{self.port}{self.path}"


class UrlPrefix(NamedTuple):
    """Same scheme, host (or network) and port; the path is a prefix in whole parts."""

    scheme: str
    host: str | IPv4Network | IPv6Network
    port: int
    path: str

    @classmethod
    def parse(cls, prefix: str) -> UrlPrefix:
        """Raises ValueError."""
        found = _NETWORK.fullmatch(prefix)
        if found is None:
            return cls(*EngineUrl.parse(prefix))
        scheme = found["scheme"].lower()
        network = ip_network(found["v4"] or found["v6"])
        return cls(scheme, network, _port(found["port"], scheme), found["path"])

    def admits(self, url: EngineUrl) -> bool:
        return (
            (url.scheme, url.port) == (self.scheme, self.port)
            and self._has_host(url.host)
            and (url.path == self.path or url.path.startswith(self.path + "/"))
        )

    def _has_host(self, host: str) -> bool:
        if isinstance(self.host, str):
            return host == self.host
        try:
            return ip_address(host.strip("[]")) in self.host
        except ValueError:  # a name
            return False


class Admission:
    """What may join at run time."""

    def __init__(self, prefixes: Iterable[UrlPrefix] = ()) -> None:
        self._prefixes = tuple(prefixes)

    def admits(self, url: EngineUrl) -> bool:
        return any(prefix.admits(url) for prefix in self._prefixes)


def _host(host: str) -> str:
    if not host.startswith("["):
        return host.lower()
    return f"[{IPv6Address(host[1:-1]).compressed}]"


def _port(port: str | None, scheme: str) -> int:
    if port is None:
        return _DEFAULT_PORTS[scheme]
    if not 1 <= int(port) <= 65535:
        raise ValueError(f"port {port} is not between 1 and 65535")
    return int(port)
