"""Free TCP ports for a cluster's processes."""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Sequence

from scheduler_svc.wire.addresses import is_ipv6

LOWEST, HIGHEST = 17500, 22000
"""Where nobody else draws ports: an engine binds its own a minute after it was chosen.  Linux's
outgoing connections take theirs from 32768 up, SGLang's ranks meet on one of 22000-29999
(`get_free_port_below_ephemeral`), Mooncake's peers listen on 15000-17000."""


DP_ATTENTION_OFFSETS = (13, *range(233, 241))
"""With DP attention SGLang listens so far above a server's HTTP port, too (`PortArgs.init_new`)."""


class FreePorts:
    """Hands out ports that are free on `host`, each once in this process, whoever asks for it."""

    def __init__(self, host: str):
        self._host = host

    def take(self, offsets: Sequence[int] = ()) -> int:
        """A port, which `offsets` above it are handed out with.

        Raises OSError when no port is free, or `host` is no address of this machine.
        """
        last = HIGHEST - max(offsets, default=0)
        for port in _random.sample(range(LOWEST, last), last - LOWEST):
            wanted = {(self._host, port + offset) for offset in (0, *offsets)}
            if not wanted & _taken and all(self._is_free(each) for _, each in wanted):
                _taken.update(wanted)
                return port
        raise OSError(f"no free port on {self._host} in {LOWEST}..{HIGHEST}")

    def _is_free(self, port: int) -> bool:
        family = socket.AF_INET6 if is_ipv6(self._host) else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self._host, port))
            except OSError as error:
                if error.errno in _BUSY:
                    return False
                raise
        return True


_taken: set[tuple[str, int]] = set()
"""Hosts and ports: one may be bound long after it was drawn, and looks free until then."""
_BUSY = {errno.EADDRINUSE, errno.EACCES}
# Not the shared generator: a caller that seeds it would get the same ports in every process.
_random = random.SystemRandom()
