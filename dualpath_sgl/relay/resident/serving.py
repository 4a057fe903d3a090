"""What one rank of a decode engine serves: its host pools, an index of them, and the server that answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from dualpath_sgl.lanes.forward import Forwarder
from dualpath_sgl.relay.resident.index import Index
from dualpath_sgl.relay.resident.lives import Lives, lives_of
from dualpath_sgl.relay.resident.server import ResidentServer

logger = logging.getLogger(__name__)


class Serving:
    """One for the process, whenever its storage is attached: memory is registered once."""

    def __init__(self, forwarder: Forwarder, new_server: Callable[[Index, str, int], ResidentServer]) -> None:
        """`new_server` is given the index, Mooncake's name of its memory and an address in it."""
        self.index = Index()
        self.server: ResidentServer | None = None
        self._forwarder = forwarder
        self._new_server = new_server
        self._registered: set[int] = set()

    def serve(self, pool: Any, buffers: Iterable[Any]) -> Lives | None:
        """Answer for what will be noted of `pool`, whose memory the tensors `buffers` are.

        None, with the reason in the log, when nothing of it can be served.  Raises door.BindRefused, and
        RuntimeError when Mooncake does not register the memory.
        """
        lives = lives_of(pool)
        if lives is None:
            logger.warning("DualPath: %s is not served to prefill engines by key", type(pool).__name__)
            return None
        address = 0
        for buffer in buffers:
            address = buffer.data_ptr()
            if address not in self._registered:
                self._forwarder.register(address, buffer.numel() * buffer.element_size())
                self._registered.add(address)
        if self.server is None:
            self.server = self._new_server(self.index, self._forwarder.mooncake_address, address)
            self.server.start()
            logger.info("DualPath: held objects are served at %s", self.server.endpoint)
        return lives
