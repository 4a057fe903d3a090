"""Connections to a cluster's own parts: HTTP never through a proxy, whatever the environment names."""

from __future__ import annotations

import http.client
import socket
import urllib.request

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def fetch(request: str | urllib.request.Request, timeout_s: float) -> bytes:
    """The body.  Raises OSError (urllib.error.HTTPError for an HTTP error status)."""
    try:
        with _opener.open(request, timeout=timeout_s) as answer:
            return answer.read()
    except http.client.HTTPException as error:
        raise OSError(f"no HTTP answer: {error!r}") from None


def answers(url: str, timeout_s: float) -> bool:
    """Whether a GET ends well in time."""
    try:
        fetch(url, timeout_s)
    except OSError:
        return False
    return True


def listens(host: str, port: int, timeout_s: float) -> bool:
    """Whether a TCP connection is taken in time."""
    try:
        socket.create_connection((host, port), timeout_s).close()
    except OSError:
        return False
    return True
