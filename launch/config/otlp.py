"""Where a copy of all spans goes: an OTLP endpoint, over gRPC or over HTTP."""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import urlsplit

from dualpath_sgl.launch.config.hosts import checked
from scheduler_svc.wire.addresses import authority, is_ipv6

EXAMPLES = (
    "give HOST:PORT or grpcs://HOST:PORT (OTLP/gRPC, port 4317), or http(s)://HOST:PORT (OTLP/HTTP, 4318)"
)
GRPC_PORT, HTTP_PORT, JAEGER_UI_PORT = 4317, 4318, 16686
TRACES_PATH = "/v1/traces"
HEADERS_VARIABLE = "DUALPATH_COLLECTOR_HEADERS"
"""The collector's variable with headers for the receiver, a JSON object."""
_SCHEMES = {"grpc": (True, False), "grpcs": (True, True), "http": (False, False), "https": (False, True)}
"""Scheme -> speaks gRPC, in TLS."""


class OtlpEndpoint(NamedTuple):
    grpc: bool
    tls: bool
    host: str
    port: int
    path: str
    """Of a URL; empty with gRPC."""

    @property
    def target(self) -> str:
        """HOST:PORT."""
        return authority(self.host, self.port)

    @property
    def url(self) -> str:
        """Of an HTTP endpoint."""
        return f"http{'s' * self.tls}://{self.target}{self.path}"


def parsed(endpoint: str) -> OtlpEndpoint:
    """Raises ValueError with the remedy."""
    scheme, separator, rest = endpoint.partition("://")
    if not separator:
        scheme, rest = "grpc", endpoint
    if scheme not in _SCHEMES or not rest.isascii() or re.search(r"[\s?#@]", rest):
        raise ValueError(EXAMPLES)
    grpc, tls = _SCHEMES[scheme]
    try:
        parts = urlsplit(f"//{rest}")
        host, port = parts.hostname, parts.port
        written = re.fullmatch(r"(?:\[[^]]*\]|[^:]*):[0-9]{1,5}", parts.netloc)
        if not (host and port and written) or is_ipv6(host) != parts.netloc.startswith("["):
            raise ValueError
        checked(host)
    except ValueError:
        raise ValueError(f"a host and a port of 1 to 65535 are needed; {EXAMPLES}") from None
    _check_port(port, grpc)
    if grpc and parts.path not in ("", "/"):
        raise ValueError(f"OTLP/gRPC has no path such as {parts.path!r}; {EXAMPLES}")
    path = "" if grpc else TRACES_PATH if parts.path in ("", "/") else parts.path
    return OtlpEndpoint(grpc, tls, host, port, path)


def _check_port(port: int, grpc: bool) -> None:
    """Raises ValueError for a port that belongs to the other protocol."""
    if port == JAEGER_UI_PORT:
        raise ValueError(f"{port} is the port of Jaeger's pages; {EXAMPLES}")
    if grpc and port == HTTP_PORT:
        raise ValueError(f"{port} is the port of OTLP/HTTP: write http:// before it; or take {GRPC_PORT}")
    if not grpc and port == GRPC_PORT:
        raise ValueError(f"{port} is the port of OTLP/gRPC: leave http:// away; or take {HTTP_PORT}")


def checked_otlp(endpoint: str) -> str:
    """`endpoint` if it is one.  Raises ValueError with the remedy."""
    parsed(endpoint)
    return endpoint
