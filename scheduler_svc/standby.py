"""A second scheduler waits until the first one's address is free: its process is gone, or the address has moved here.

What a scheduler knows comes again with the engines' heartbeats, so nothing is handed over.
"""

from __future__ import annotations

import errno
import logging
import socket
import time

LOOK_S = 0.05
"""What a takeover waits for beside the engines' own reconnecting (0.1 s and more)."""
_TAKEN = (errno.EADDRINUSE, errno.EADDRNOTAVAIL)
"""By another process, or by another host: of a virtual address."""

logger = logging.getLogger(__name__)


def await_free(host: str, port: int) -> None:
    """Return when this process could listen there.  Raises OSError when that will never be so."""
    said = False
    while not _is_free(host, port):
        if not said:
            logger.info("standing by: %s port %d is another's", host, port)
            said = True
        time.sleep(LOOK_S)


def _is_free(host: str, port: int) -> bool:
    family, kind, number, _, address = socket.getaddrinfo(
        host.strip("[]").replace("*", "0.0.0.0"), port, type=socket.SOCK_STREAM
    )[0]
    with socket.socket(family, kind, number) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno in _TAKEN:
                return False
            raise
    return True
