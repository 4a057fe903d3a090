"""The DE rank's page server: tells PEs where pinned pages lie, and knows until when.

A room's pages are *offered* from the DE's plan until they were released, their lease ended, or the DE
needs the memory back.  Withdrawing comes first, unpinning after it: whoever asks after that is
told that what it read does not count (peer_protocol.py, whose other end is peer_lane.py).

It runs inside an engine: what a message costs in time and memory is bounded, whoever sends it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import zmq

from dualpath_sgl.lanes import peer_protocol
from dualpath_sgl.lanes.peer_keys import PeerKeys
from dualpath_sgl.lanes.peer_protocol import Ended, Pages, Pull, Reading, Released, Waiting
from dualpath_sgl.threads import faults
from dualpath_sgl.threads.mailbox import Mailbox
from scheduler_svc.telemetry.log_limit import LimitedLog
from scheduler_svc.wire.addresses import in_url, is_ipv6
from scheduler_svc.wire.connections import Connections, fd_of
from scheduler_svc.wire.liveness import notice_dead_peers
from scheduler_svc.wire.protocol import Wire, encode

logger = logging.getLogger(__name__)

POLL_MS = 100
"""How often leases and silent pulls are looked for."""
WAITING_S = 0.5
"""How often a PE whose room is offered and has no news is told to wait on."""
WITHDRAWN_REMEMBERED = 4096
"""Rooms.  A PE that asks for one of them is told so at once and need not wait for a plan to arrive."""
EARLY_PULLS = 1024
"""Pulls for rooms that are not offered (yet); when there are more, the oldest goes of whoever has most."""
MOST_UNFINISHED_BYTES = 2 * peer_protocol.MAX_MESSAGE_BYTES
"""Beyond this without an end of the message a connection is cut."""
MESSAGES_AT_A_TIME = 256
"""Then pages are sent and leases looked after, however many messages wait."""
LEASES_WHILE_READING = 10
"""A PE that reads on keeps its room so many leases long after the DE last vouched for it, and no longer."""
ANOTHER_ENGINE = "pulled by another engine"


@dataclass
class _Offer:
    first_page: int
    prompt_hash: str | None
    lease_until_s: float
    subscribe_until_s: float
    vouched_s: float
    """When the DE last said that it needs the room."""
    pages: list[tuple[int, ...]] = field(default_factory=list)
    """Addresses of the blocks of page `first_page + i`."""
    sizes: tuple[int, ...] = ()
    subscribed: bool = False
    """A PE has asked for it."""
    ended: bool = False
    reason: str | None = None
    on_withdrawal: list[Callable[[], None]] = field(default_factory=list)
    strangers: set[bytes] = field(default_factory=set)
    """Lanes that asked for this room and meant another prompt: nothing of it is theirs to release."""
    served: bytes | None = None
    """The lane that was told where its pages lie, in this life of the room: numbers may come again."""

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
    offer: _Offer | None = None
    """What it is served from, once there is an offer."""


class PageServer(threading.Thread):
    def __init__(
        self,
        host: str,
        mooncake_address: str,
        fingerprint: str,
        lease_s: float,
        subscribe_timeout_s: float,
        keys: PeerKeys | None = None,
        port: int = 0,
    ) -> None:
        """With `keys` it speaks CURVE, and only with the holders of those.  Port 0 takes a free one.

        Raises RuntimeError when it cannot listen there.
        """
        super().__init__(name="dualpath-page-server", daemon=True)
        self._mooncake_address = mooncake_address
        self.fingerprint = fingerprint
        """May be set at any time; only pulls that name it are served from then on."""
        self._lease_s = lease_s
        self._subscribe_timeout_s = subscribe_timeout_s
        self._offers: dict[int, _Offer] = {}
        self._withdrawn: OrderedDict[int, None] = OrderedDict()
        self._lock = threading.Lock()
        """Guards the two above; held for as long as one room's next message takes to make."""
        self._pullers: OrderedDict[int, _Puller] = OrderedDict()
        """By room; the server's own thread."""
        self._pulls_of: Counter[bytes] = Counter()
        """`_pullers` by who pulls."""
        self._wake: Mailbox[int] = Mailbox()
        """Rooms of which there is news."""
        self._look_s = 0.0
        """When all pulls are looked at next, news or not."""
        self._noise = LimitedLog(logger)
        self._keys = keys
        self._socket = keys.server_socket() if keys else zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, peer_protocol.MAX_MESSAGE_BYTES)
        notice_dead_peers(self._socket)
        self._connections = Connections(self._socket, MOST_UNFINISHED_BYTES)
        # A lane keeps its name when its connection breaks, and is itself again on the next one.
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.setsockopt(zmq.IPV6, int(is_ipv6(host)))
        address = f"tcp://{in_url(host)}"
        try:
            if port == 0:
                port = self._socket.bind_to_random_port(address)
            else:
                self._socket.bind(f"{address}:{port}")
        except zmq.ZMQError as error:
            self._connections.close()
            self._socket.close()
            raise RuntimeError(
                f"cannot bind port {port} of {host}: {error.strerror}; is another engine there? Give each a "
                "DUALPATH_PAGE_PORT of its own"
            ) from None
        self.endpoint = f"{address}:{port}"

    # -- called by the DE's scheduler thread and lanes --------------------------------------

    def offer(self, room: int, first_page: int, prompt_hash: str | None = None) -> None:
        """Begin to offer pages from `first_page` on, to whoever means the prompt of that hash."""
        self.withdraw(room)
        now_s = time.monotonic()
        with self._lock:
            self._withdrawn.pop(room, None)
            self._offers[room] = _Offer(
                first_page,
                prompt_hash,
                lease_until_s=now_s + self._lease_s,
                subscribe_until_s=now_s + self._subscribe_timeout_s,
                vouched_s=now_s,
            )
        self._wake.put(room)

    def renew(self, room: int) -> None:
        """The DE still reads for this room, however long its storage queue is."""
        with self._lock:
            offer = self._offers.get(room)
            if offer is not None:
                self._vouch(offer)

    def publish(
        self,
        room: int,
        pages: Sequence[tuple[int, ...]],
        sizes: tuple[int, ...],
        unpin: Callable[[], None] | None = None,
    ) -> None:
        """The next pages are whole and pinned; `unpin` is called once the offer is withdrawn, at once if it
        is so already.
        """
        with self._lock:
            offer = self._offers.get(room)
            if offer is not None:
                offer.pages.extend(pages)
                offer.sizes = sizes
                self._vouch(offer)
                if unpin is not None:
                    offer.on_withdrawal.append(unpin)
        if offer is None and unpin is not None:
            unpin()
        self._wake.put(room)

    def end(self, room: int, reason: str | None = None) -> None:
        """No further page will be published; `reason` says why when some are missing."""
        with self._lock:
            offer = self._offers.get(room)
            if offer is not None:
                offer.ended, offer.reason = True, reason
        self._wake.put(room)

    def when_withdrawn(self, room: int, callback: Callable[[], None]) -> None:
        """Call `callback` (on any thread) once nobody may count on the room's pages any more."""
        with self._lock:
            offer = self._offers.get(room)
            if offer is not None:
                offer.on_withdrawal.append(callback)
                return
        callback()

    def withdraw(self, room: int) -> None:
        """Take the pages back now: what is read from here on does not count."""
        with self._lock:
            offer = self._offers.pop(room, None)
            if offer is None:
                return
            self._withdrawn[room] = None
            if len(self._withdrawn) > WITHDRAWN_REMEMBERED:
                self._withdrawn.popitem(last=False)
        for callback in offer.on_withdrawal:
            try:
                callback()
            except Exception:
                faults.record("a page of room %d may stay pinned", room)

    def withdraw_all(self) -> None:
        for room in list(self._offers):
            self.withdraw(room)

    def offers(self, room: int) -> bool:
        return room in self._offers

    @property
    def offered_rooms(self) -> int:
        return len(self._offers)

    def _vouch(self, offer: _Offer) -> None:
        offer.vouched_s = time.monotonic()
        offer.lease_until_s = max(offer.lease_until_s, offer.vouched_s + self._lease_s)

    # -- the server's own thread -------------------------------------------------------------

    def run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake.fd, zmq.POLLIN)
        poller.register(self._connections.monitor, zmq.POLLIN)
        while True:
            try:
                poller.poll(POLL_MS)
                self._turn()
            except zmq.ContextTerminated:
                return
            except Exception:
                faults.record("the page server goes on after a step that failed")
                time.sleep(POLL_MS / 1000)

    def _turn(self) -> None:
        """Whatever there is to do at the moment; never waits."""
        news = set(self._wake.drain())
        news.update(self._receive_some())
        self._connections.tick()
        self._noise.tick()
        self._expire()
        if time.monotonic() >= self._look_s:
            news.update(self._pullers)
            self._look_s = time.monotonic() + POLL_MS / 1000
        for room in news:
            self._push(room)

    def _receive_some(self) -> set[int]:
        """Handle what waits, up to a limit; rooms that somebody asks for."""
        asked = set()
        for _ in range(MESSAGES_AT_A_TIME):
            if not self._socket.poll(0):
                break
            sender, *frames = self._socket.recv_multipart(copy=False)
            self._connections.heard(fd_of(sender))
            if self._keys is not None and not self._keys.admits(sender):
                continue
            identity = sender.bytes
            try:
                message = peer_protocol.decode_to_server(b"".join(frame.bytes for frame in frames))
            except ValueError as error:
                self._warn("DualPath page server: ignored a malformed message: %s", error)
                continue
            if isinstance(message, Pull):
                self._pull(identity, message)
                asked.add(message.room)
            elif isinstance(message, Reading):
                self._read_on(identity, message.room)
            else:
                self._release(identity, message.room)
        return asked

    def _pull(self, identity: bytes, pull: Pull) -> None:
        if refusal := self._refusal(identity, pull):
            self._send(identity, Ended(room=pull.room, end_page=pull.first_page, reason=refusal))
            return
        now_s = time.monotonic()
        self._pulls_of[identity] += pull.room not in self._pullers
        self._pullers[pull.room] = _Puller(identity, pull, now_s, pull.first_page, now_s)
        if len(self._pullers) > EARLY_PULLS + len(self._offers):
            self._drop_oldest_early_pull()

    def _refusal(self, identity: bytes, pull: Pull) -> str | None:
        if pull.version != peer_protocol.VERSION:
            return f"peer protocol {pull.version}, this engine speaks {peer_protocol.VERSION}"
        if pull.fingerprint != self.fingerprint:
            return "layout differs"
        other = self._pullers.get(pull.room)
        if other is not None and other.identity != identity:
            return ANOTHER_ENGINE
        return None

    def _drop_oldest_early_pull(self) -> None:
        ((busiest, _),) = self._pulls_of.most_common(1)
        early = (room for room in self._pullers if room not in self._offers)
        dropped = next((room for room in early if self._pullers[room].identity == busiest), None)
        if dropped is None:  # all of the busiest one's are offered
            dropped = next((room for room in self._pullers if room not in self._offers), None)
        if dropped is not None:
            puller = self._pullers[dropped]
            self._forget_puller(dropped)
            self._send(puller.identity, Ended(room=dropped, end_page=puller.next_page, reason="not offered"))

    def _forget_puller(self, room: int) -> None:
        puller = self._pullers.pop(room, None)
        if puller is not None:
            self._pulls_of[puller.identity] -= 1
            if not self._pulls_of[puller.identity]:
                del self._pulls_of[puller.identity]

    def _may_speak(self, identity: bytes, room: int, offer: _Offer | None) -> bool:
        """Whether `identity` may end `room`: neither another lane's nor another prompt's."""
        puller = self._pullers.get(room)
        if puller is not None and puller.identity != identity:
            return False
        return offer is None or (offer.served in (None, identity) and identity not in offer.strangers)

    def _read_on(self, identity: bytes, room: int) -> None:
        """The PE reads what was offered, and has not come to its end."""
        with self._lock:
            offer = self._offers.get(room)
            if offer is not None and offer.served == identity:
                longest_s = offer.vouched_s + LEASES_WHILE_READING * self._lease_s
                wished_s = min(time.monotonic() + self._lease_s, longest_s)
                offer.lease_until_s = max(offer.lease_until_s, wished_s)

    def _release(self, identity: bytes, room: int) -> None:
        with self._lock:
            offer = self._offers.get(room)
        # Answered before the withdrawal unpins anything.
        self._send(identity, Released(room=room, valid=offer is not None and offer.served == identity))
        if self._may_speak(identity, room, offer):
            self._forget_puller(room)
            self.withdraw(room)

    def _expire(self) -> None:
        now_s = time.monotonic()
        with self._lock:
            over = [
                room
                for room, offer in self._offers.items()
                if now_s > offer.lease_until_s or (not offer.subscribed and now_s > offer.subscribe_until_s)
            ]
        for room in over:
            self._warn("DualPath: lease of room %d ended before its pages were released", room)
            self.withdraw(room)

    def _push(self, room: int) -> None:
        """Tell whoever pulls `room` what is new of it."""
        puller = self._pullers.get(room)
        if puller is None:
            return
        now_s = time.monotonic()
        message = self._news(puller, now_s)
        if message is None:
            if now_s - puller.news_s > WAITING_S:
                self._send(puller.identity, Waiting(room=room))
                puller.news_s = now_s
            return
        self._send(puller.identity, message)
        puller.news_s = now_s
        if isinstance(message, Ended):
            self._forget_puller(room)
            return
        puller.next_page += len(message.pointers) // len(message.sizes)
        self._wake.put(room)  # there may be more, after the other rooms' turn

    def _news(self, puller: _Puller, now_s: float) -> Pages | Ended | None:
        room = puller.pull.room
        with self._lock:
            offer = self._offers.get(room)
            puller.offer = puller.offer or offer
            if offer is not None and puller.offer is offer:
                return self._news_of(puller, offer)
            is_over = room in self._withdrawn or offer is not puller.offer
        if is_over:
            return Ended(room=room, end_page=puller.next_page, reason="lease ended")
        if now_s < puller.since_s + self._subscribe_timeout_s:
            return None  # the plan may reach the PE first
        return Ended(room=room, end_page=puller.next_page, reason="not offered")

    def _news_of(self, puller: _Puller, offer: _Offer) -> Pages | Ended | None:
        pull, first = puller.pull, puller.next_page
        if offer.served not in (None, puller.identity):
            return Ended(room=pull.room, end_page=first, reason=ANOTHER_ENGINE)
        if offer.first_page > pull.first_page:
            return Ended(room=pull.room, end_page=first, reason="not offered")
        if offer.prompt_hash and pull.prompt_hash and offer.prompt_hash != pull.prompt_hash:
            offer.strangers.add(puller.identity)
            return Ended(room=pull.room, end_page=first, reason="another prompt")
        offer.strangers.discard(puller.identity)
        offer.subscribed = True
        end = min(offer.end_page, pull.end_page)
        if first < end:
            most = max(1, peer_protocol.MOST_POINTERS // len(offer.sizes))
            begin = first - offer.first_page
            offered = offer.pages[begin : begin + min(most, end - first)]
            offer.served = puller.identity
            return Pages(
                room=pull.room,
                mooncake_address=self._mooncake_address,
                first_page=first,
                pointers=tuple(pointer for page in offered for pointer in page),
                sizes=offer.sizes,
            )
        if end == pull.end_page or offer.ended:
            missing = None if end == pull.end_page else offer.reason or "fewer pages than planned"
            return Ended(room=pull.room, end_page=max(end, pull.first_page), reason=missing)
        return None

    def _warn(self, text: str, *arguments: object) -> None:
        self._noise.log(logging.WARNING, text, *arguments)

    def _send(self, identity: bytes, message: Wire) -> None:
        self._socket.send_multipart([identity, encode(message)])
