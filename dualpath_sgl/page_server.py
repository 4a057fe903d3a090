"""The DE rank's page server: tells PEs where pinned pages lie, and knows until when.

A room is *open* from the DE's plan until its pages were released, its lease ended, or the DE
needs the memory back.  Closing comes first, unpinning after it: whoever asks after the close is
told that what it read does not count (see peer_protocol).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Callable, Sequence

import zmq

from dualpath_sgl import peer_protocol
from dualpath_sgl.mailbox import Mailbox
from dualpath_sgl.peer_keys import PeerKeys
from dualpath_sgl.peer_protocol import Ended, Pages, Pull, Release, Released, Waiting
from scheduler_svc.protocol import Wire, encode

logger = logging.getLogger(__name__)

WAITING_S = 0.5
"""How often a PE with an open room and no news is told to wait on."""
CLOSED_REMEMBERED = 4096
"""Rooms.  A PE that asks for one of them is told so at once and need not wait for a plan to arrive."""


@dataclass
class _Room:
    first_page: int
    lease_until_s: float
    subscribe_until_s: float
    pages: list[tuple[int, ...]] = field(default_factory=list)
    """Addresses of the blocks of page `first_page + i`."""
    sizes: tuple[int, ...] = ()
    subscribed: bool = False
    """A PE has asked for it."""
    ended: bool = False
    reason: str | None = None
    on_close: list[Callable[[], None]] = field(default_factory=list)

    @property
    def end_page(self) -> int:
        return self.first_page + len(self.pages)


@dataclass
class _Puller:
    identity: bytes
    pull: Pull
    since_s: float
    next_page: int
    news_s: float


class PageServer(threading.Thread):
    def __init__(
        self,
        host: str,
        session: str,
        fingerprint: str,
        lease_s: float,
        subscribe_timeout_s: float,
        keys: PeerKeys | None = None,
    ) -> None:
        """With `keys` it speaks CURVE, and only with the holders of those."""
        super().__init__(name="dualpath-page-server", daemon=True)
        self._session = session
        self.fingerprint = fingerprint
        """May be set at any time; only pulls that name it are served from then on."""
        self._lease_s = lease_s
        self._subscribe_timeout_s = subscribe_timeout_s
        self._rooms: dict[int, _Room] = {}
        self._closed: OrderedDict[int, None] = OrderedDict()
        self._pullers: dict[int, _Puller] = {}
        self._lock = threading.Lock()
        self._wake: Mailbox[None] = Mailbox()
        self._keys = keys
        self._socket = keys.server_socket() if keys else zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, peer_protocol.MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.IPV6, int(":" in host))
        address = f"tcp://[{host}]" if ":" in host else f"tcp://{host}"
        self.endpoint = f"{address}:{self._socket.bind_to_random_port(address)}"

    # -- called by the DE's scheduler thread and lanes --------------------------------------

    def open(self, room: int, first_page: int) -> None:
        """Begin to offer pages from `first_page` on."""
        self.close(room)
        now_s = time.monotonic()
        with self._lock:
            self._closed.pop(room, None)
            self._rooms[room] = _Room(
                first_page, now_s + self._lease_s, now_s + self._subscribe_timeout_s
            )

    def renew(self, room: int) -> None:
        """The DE still reads for this room, however long its storage queue is."""
        with self._lock:
            state = self._rooms.get(room)
            if state is not None:
                state.lease_until_s = time.monotonic() + self._lease_s

    def publish(
        self,
        room: int,
        pages: Sequence[tuple[int, ...]],
        sizes: tuple[int, ...],
        unpin: Callable[[], None] | None = None,
    ) -> None:
        """The next pages are whole and pinned; `unpin` is called once the room is closed.

        Of a room that is closed already `unpin` is called at once.
        """
        with self._lock:
            state = self._rooms.get(room)
            if state is not None:
                state.pages.extend(pages)
                state.sizes = sizes
                state.lease_until_s = time.monotonic() + self._lease_s
                if unpin is not None:
                    state.on_close.append(unpin)
        if state is None and unpin is not None:
            unpin()
        self._wake.put(None)

    def end(self, room: int, reason: str | None = None) -> None:
        """No further page will be published; `reason` says why when some are missing."""
        with self._lock:
            state = self._rooms.get(room)
            if state is not None:
                state.ended, state.reason = True, reason
        self._wake.put(None)

    def when_closed(self, room: int, callback: Callable[[], None]) -> None:
        """Call `callback` (on any thread) once nobody may count on the room's pages any more."""
        with self._lock:
            state = self._rooms.get(room)
            if state is not None:
                state.on_close.append(callback)
                return
        callback()

    def close(self, room: int) -> None:
        """Take the pages back now: what is read from here on does not count."""
        with self._lock:
            state = self._rooms.pop(room, None)
            if state is not None:
                self._closed[room] = None
                if len(self._closed) > CLOSED_REMEMBERED:
                    self._closed.popitem(last=False)
        for callback in state.on_close if state is not None else ():
            try:
                callback()
            except Exception:
                logger.exception("DualPath: a page of room %d may stay pinned", room)

    def close_all(self) -> None:
        for room in list(self._rooms):
            self.close(room)

    @property
    def open_rooms(self) -> int:
        return len(self._rooms)

    # -- the server's own thread -------------------------------------------------------------

    def run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake.fd, zmq.POLLIN)
        while True:
            ready = dict(poller.poll(100))
            for _ in self._wake.drain():
                pass
            try:
                while self._socket in ready and self._socket.poll(0):
                    self._receive()
                self._expire()
                self._push()
            except Exception:
                logger.exception("DualPath page server: a step failed, going on")

    def _receive(self) -> None:
        identity, *frames = self._socket.recv_multipart(copy=False)
        if self._keys is not None and not self._keys.admits(identity):
            return
        identity = identity.bytes
        try:
            message = peer_protocol.decode_to_server(b"".join(frame.bytes for frame in frames))
        except ValueError as error:
            logger.warning("DualPath page server: ignored a malformed message: %s", error)
            return
        if isinstance(message, Pull):
            if message.fingerprint != self.fingerprint:
                self._send(
                    identity,
                    Ended(room=message.room, end_page=message.first_page, reason="layout differs"),
                )
                return
            now_s = time.monotonic()
            self._pullers[message.room] = _Puller(
                identity, message, now_s, message.first_page, now_s
            )
        elif isinstance(message, Release):
            with self._lock:
                valid = message.room in self._rooms
            # Answered before the close unpins anything.
            self._send(identity, Released(room=message.room, valid=valid))
            self._pullers.pop(message.room, None)
            self.close(message.room)

    def _expire(self) -> None:
        now_s = time.monotonic()
        with self._lock:
            over = [
                room
                for room, state in self._rooms.items()
                if now_s > state.lease_until_s
                or (not state.subscribed and now_s > state.subscribe_until_s)
            ]
        for room in over:
            logger.warning("DualPath: lease of room %d ended before its pages were released", room)
            self.close(room)

    def _push(self) -> None:
        now_s = time.monotonic()
        for room, puller in list(self._pullers.items()):
            with self._lock:
                state = self._rooms.get(room)
                if state is not None:
                    state.subscribed = True
                    news = self._news(puller, state)
                elif room in self._closed:
                    news = [Ended(room=room, end_page=puller.next_page, reason="lease ended")]
                elif now_s < puller.since_s + self._subscribe_timeout_s:
                    news = []  # the plan may reach the PE first
                else:
                    news = [Ended(room=room, end_page=puller.next_page, reason="not offered")]
            for message in news:
                self._send(puller.identity, message)
                puller.news_s = now_s
                if isinstance(message, Pages):
                    puller.next_page += len(message.pointers) // len(message.sizes)
                elif isinstance(message, Ended):
                    del self._pullers[room]
            if not news and now_s - puller.news_s > WAITING_S:
                self._send(puller.identity, Waiting(room=room))
                puller.news_s = now_s

    def _news(self, puller: _Puller, state: _Room) -> list[Wire]:
        pull = puller.pull
        if state.first_page > pull.first_page:
            return [Ended(room=pull.room, end_page=puller.next_page, reason="not offered")]
        news: list[Wire] = []
        end = min(state.end_page, pull.end_page)
        if puller.next_page < end:
            offered = state.pages[puller.next_page - state.first_page : end - state.first_page]
            news.append(
                Pages(
                    room=pull.room,
                    session=self._session,
                    first_page=puller.next_page,
                    pointers=tuple(pointer for page in offered for pointer in page),
                    sizes=state.sizes,
                )
            )
        if end == pull.end_page or state.ended:
            missing = None if end == pull.end_page else state.reason or "fewer pages than planned"
            news.append(Ended(room=pull.room, end_page=max(end, pull.first_page), reason=missing))
        return news

    def _send(self, identity: bytes, message: Wire) -> None:
        self._socket.send_multipart([identity, encode(message)])
