"""The peer lane: one DE's host pool -> this PE's host pool.

One lane per DE rank.  It is driven by what the DE says is ready, so waiting for one request's
pages never delays another's, nor the store lane.  A pull ends in exactly one way: all its pages
confirmed and landed, or its missing pages handed to `on_missing` for another source.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Callable

import zmq

from dualpath_sgl import peer_protocol
from dualpath_sgl.forward import Forwarder, merge_runs
from dualpath_sgl.lane_priority import wait_politely
from dualpath_sgl.mailbox import Mailbox
from dualpath_sgl.page_load import LaneClock, PageLoad
from dualpath_sgl.peer_keys import Secure
from dualpath_sgl.peer_protocol import Ended, Pages, Pull, Release, Released
from scheduler_svc.protocol import Wire, encode

logger = logging.getLogger(__name__)

POLL_MS = 50
"""How often cancelled and silent pulls are looked for."""

OnMissing = Callable[[PageLoad, int, int, str], None]
"""`(load, first, end, reason)`: pages `[first, end)` of `load` did not come from the peer."""


@dataclass
class _Pull:
    load: PageLoad
    room: int
    end: int
    """Wanted: pages `[0, end)` of the load."""
    clock: LaneClock
    deadline_s: float = 0.0
    """Given up when the DE says nothing until then."""
    read: int = 0
    """Pages `[0, read)` were read and wait for the DE's confirmation."""
    reason: str | None = None
    """Why fewer than `end` pages are read."""
    releasing: bool = False


class PeerLane(threading.Thread):
    def __init__(
        self,
        endpoint: str,
        forwarder: Forwarder,
        fingerprint: str,
        timeout_s: float,
        on_missing: OnMissing,
        secure: Secure | None = None,
    ) -> None:
        """`secure` makes the lane's socket speak CURVE to this DE (`PeerKeys.towards`)."""
        super().__init__(name=f"dualpath-peer-lane {endpoint}", daemon=True)
        self._endpoint = endpoint
        self._forwarder = forwarder
        self.fingerprint = fingerprint
        """Of the pages it asks for; may be set at any time."""
        self._timeout_s = timeout_s
        self._on_missing = on_missing
        self._secure = secure
        self._mailbox: Mailbox[_Pull | Release] = Mailbox()
        self._pulls: dict[int, _Pull] = {}

    def submit(self, load: PageLoad, room: int, end: int) -> None:
        """Forward pages `[0, end)` of `load`; the part is open from now on."""
        self._mailbox.put(_Pull(load, room, end, load.open_part("peer", 0)))

    def let_go(self, room: int) -> None:
        """No page of `room` will be pulled."""
        self._mailbox.put(Release(room=room))

    def run(self) -> None:
        wait_politely()
        self._socket = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, peer_protocol.MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.IPV6, int("[" in self._endpoint))
        if self._secure is not None:
            self._secure(self._socket)
        try:
            self._socket.connect(self._endpoint)
        except zmq.ZMQError as error:
            # Its pulls meet a silent peer: their pages come from elsewhere.
            logger.error("DualPath: page server address %r: %s", self._endpoint, error)
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._mailbox.fd, zmq.POLLIN)
        while True:
            poller.poll(POLL_MS)
            for item in self._mailbox.drain():
                if isinstance(item, Release):
                    self._send(item)
                else:
                    self._begin(item)
            while self._socket.poll(0):
                self._receive(self._socket.recv())
            self._give_up_overdue()

    def _begin(self, pull: _Pull) -> None:
        self._pulls[pull.room] = pull
        pull.deadline_s = time.monotonic() + self._timeout_s
        first_page = pull.load.first_page
        self._send(
            Pull(
                room=pull.room,
                first_page=first_page,
                end_page=first_page + pull.end,
                fingerprint=self.fingerprint,
            )
        )

    def _receive(self, frame: bytes) -> None:
        try:
            message = peer_protocol.decode_to_lane(frame)
        except ValueError as error:
            logger.warning("DualPath: page server %s sent nonsense: %s", self._endpoint, error)
            return
        pull = self._pulls.get(message.room)
        if pull is None:
            return  # given up before this arrived
        pull.deadline_s = time.monotonic() + self._timeout_s
        if isinstance(message, Released):
            self._finish(pull, confirmed=message.valid)
        elif pull.releasing:
            return
        elif isinstance(message, Pages):
            self._read(pull, message)
        elif isinstance(message, Ended):
            pull.reason = message.reason
            self._release(pull)

    def _read(self, pull: _Pull, pages: Pages) -> None:
        if pull.load.cancelled:
            return
        load = pull.load
        count, rest = divmod(len(pages.pointers), len(pages.sizes) or 1)
        first, end = pull.read, pull.read + count
        pool = load.controller.storage_host_pool
        with load.controller.mem_pool_host.layout_lease():
            local, local_sizes = pool.get_page_buffer_meta(load.host_indices(first, end))
            sizes = list(pages.sizes) * count
            fits = pages.first_page == load.first_page + first and end <= pull.end
            if rest or not fits or local_sizes != sizes:
                pull.reason = "peer offered pages that do not fit"
                self._release(pull)
                return
            pull.clock.begin()
            blocks = merge_runs(local, pages.pointers, sizes)
            if not self._forwarder.read(pages.session, *blocks):
                pull.reason = "forward failed"
                self._release(pull)
                return
        pull.read = end
        pull.clock.moved(count, sum(sizes))
        pull.clock.blocks += len(blocks[0])
        pull.deadline_s = time.monotonic() + self._timeout_s

    def _release(self, pull: _Pull) -> None:
        pull.releasing = True
        self._send(Release(room=pull.room))

    def _finish(self, pull: _Pull, confirmed: bool) -> None:
        del self._pulls[pull.room]
        load = pull.load
        landed = pull.read if confirmed else 0
        try:
            if landed:
                load.land(0, landed)
            if not confirmed:
                pull.clock.moved(-pull.read, -pull.clock.bytes)
            if landed < pull.end and not load.cancelled:
                reason = "lease ended" if not confirmed and pull.reason is None else pull.reason
                self._on_missing(load, landed, pull.end, reason or "peer offered too few pages")
        finally:
            load.close_part()

    def _give_up_overdue(self) -> None:
        now_s = time.monotonic()
        for pull in list(self._pulls.values()):
            if pull.load.cancelled and not pull.releasing:
                pull.reason = "cancelled"
                self._release(pull)
            elif now_s > pull.deadline_s:
                pull.reason = "peer silent"
                self._send(Release(room=pull.room))
                self._finish(pull, confirmed=False)

    def _send(self, message: Wire) -> None:
        try:
            self._socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            logger.warning("DualPath: page server %s takes no messages", self._endpoint)
