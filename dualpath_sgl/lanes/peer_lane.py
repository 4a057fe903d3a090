"""The peer lane: one DE's host pool -> this PE's host pool.

One lane per DE rank; peer_protocol.py says what the two tell each other.  It is driven by what the DE says is ready, so waiting for one request's
pages never delays another's, nor the store lane.  A pull ends in exactly one way: all its pages
confirmed and landed, or its missing pages handed to `on_missing` for another source.

Offers are read in waves, the pulls taking turns; between two waves the lane listens.  A wave that
hangs is given up, and its pages stay with the transfers that may still write into them: no other
source reads into them and SGLang does not get them back (`PageLoad.withhold`) before these have
ended, nor is anything else read from that DE.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import zmq

from dualpath_sgl.lanes import peer_protocol
from dualpath_sgl.lanes.forward import Forwarder, StillWriting, merge_runs
from dualpath_sgl.lanes.page_load import LaneWork, PageLoad
from dualpath_sgl.lanes.peer_keys import Secure
from dualpath_sgl.lanes.peer_protocol import Ended, Pages, Pull, Reading, Release, Released
from dualpath_sgl.threads import faults
from dualpath_sgl.threads.mailbox import Mailbox
from dualpath_sgl.threads.priority import wait_politely
from scheduler_svc.telemetry.log_limit import LimitedLog
from scheduler_svc.wire.liveness import notice_dead_peers
from scheduler_svc.wire.protocol import Wire, encode

logger = logging.getLogger(__name__)

POLL_MS = 50
"""How often cancelled and silent pulls are looked for."""
MESSAGES_AT_A_TIME = 256
FIRST_WAVE_BYTES = 1024 * 1024
LEAST_WAVE_BYTES = 256 * 1024
MOST_WAVE_BYTES = 256 * 1024 * 1024
WAVE_S = 0.05
"""One wave takes about so long at the rate of the last one, within these sizes."""
READING_S = 1.0
"""How often the DE of an unfinished read is told to keep its pages."""
WAITS = 20
"""A DE that lives and offers nothing is waited for so many times `timeout_s`."""
IDLE_S = 60.0
"""A lane without work ends then: a DE that was restarted has another address, and another lane."""

OnMissing = Callable[[PageLoad, int, int, str], None]
"""`(load, first, end, reason)`: pages `[first, end)` of `load` did not come from the peer."""


@dataclass
class _Pull:
    load: PageLoad
    room: int
    end: int
    """Wanted: pages `[0, end)` of the load."""
    prompt_hash: str | None
    work: LaneWork
    safe_end: int
    """Another source may read pages `[0, safe_end)`."""
    deadline_s: float = 0.0
    """Given up when the DE says nothing, or its pages do not come, until then."""
    waits_until_s: float = 0.0
    """Given up when the DE offers nothing until then, whatever else it says."""
    told_s: float = 0.0
    """When the DE last heard of it."""
    offers: deque[Pages] = field(default_factory=deque)
    """Not wholly read; the first begins at or before page `read`."""
    offered: int = 0
    """Pages `[0, offered)` were offered."""
    read: int = 0
    """Pages `[0, read)` were read and wait for the DE's confirmation."""
    ended: bool = False
    """The DE offers no more."""
    reason: str | None = None
    """Why fewer than `end` pages are read."""
    releasing: bool = False
    over: bool = False


class _Greeted(NamedTuple):
    mooncake_address: str
    answers: bool


class _Unfinished(NamedTuple):
    """A wave that was given up."""

    writing: StillWriting
    pages: int
    kept: ExitStack
    """Closed when it is over."""


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
        """`secure` makes the lane's socket speak CURVE to this DE (`PeerKeys.towards`).

        Raises OSError or zmq.ZMQError when the process has no descriptor left.
        """
        super().__init__(name=f"dualpath-peer-lane {endpoint}", daemon=True)
        self._endpoint = endpoint
        self._forwarder = forwarder
        self.fingerprint = fingerprint
        """What the pages it asks for must be; may be set at any time."""
        self._timeout_s = timeout_s
        self._on_missing = on_missing
        self._mailbox: Mailbox[_Pull | Release | _Greeted] = Mailbox()
        self._door = threading.Lock()
        """Held to hand in work, and to end: no work is handed to a lane that has ended."""
        self._ended = False
        self._idle_since_s = time.monotonic()
        self._pulls: dict[int, _Pull] = {}
        """By room, as messages are; of two loads of one room the second is not pulled."""
        self._turns: deque[_Pull] = deque()
        """Pulls with something to read."""
        self._unanswered: set[int] = set()
        """Rooms given up whose release the DE has not answered: its words may still be about that pull."""
        self._known: set[str] = set()
        """Mooncake addresses that answered; reads from them are safe to begin (`Forwarder.answers`)."""
        self._greeting: str | None = None
        self._unfinished: _Unfinished | None = None
        self._wave_bytes = FIRST_WAVE_BYTES
        self._noise = LimitedLog(logger)
        self._socket: zmq.Socket = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, peer_protocol.MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.IPV6, int("[" in self._endpoint))
        notice_dead_peers(self._socket)
        # Who pulled may release, nobody else; and it is the same one when a connection was lost.
        self._socket.setsockopt(zmq.IDENTITY, b"lane" + uuid.uuid4().bytes)
        if secure is not None:
            secure(self._socket)

    # -- any thread -----------------------------------------------------------------------------

    def submit(self, load: PageLoad, room: int, end: int, prompt_hash: str | None = None) -> bool:
        """Forward pages `[0, end)` of `load`; the part is open from now on.

        `prompt_hash`: of the prompt that `room` stands for here; a DE that means another one refuses.
        False when the lane has ended: nothing was done, another one must be made.
        """
        with self._door:
            if self._ended:
                return False
            work = load.open_part("peer", 0, end)
            self._mailbox.put(_Pull(load, room, end, prompt_hash, work, safe_end=end))
            return True

    def let_go(self, room: int) -> bool:
        """No page of `room` will be pulled.  False when the lane has ended."""
        with self._door:
            if self._ended:
                return False
            self._mailbox.put(Release(room=room))
            return True

    @property
    def quarantined_pages(self) -> int:
        """Host pages that neither SGLang nor a load has, because a transfer may still write into them."""
        unfinished = self._unfinished
        return unfinished.pages if unfinished is not None else 0

    def close(self) -> None:
        """Give back what the constructor took; of a lane that could not be started, or has run."""
        self._socket.close()
        self._mailbox.close()

    # -- the lane's own thread ------------------------------------------------------------------

    def run(self) -> None:
        wait_politely()
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._mailbox.fd, zmq.POLLIN)
        try:
            self._socket.connect(self._endpoint)
        except zmq.ZMQError as error:
            # Its pulls meet a silent peer: their pages come from elsewhere.
            logger.error("DualPath: page server address %r: %s", self._endpoint, error)
        while not self._may_end():
            self._try(poller.poll, 0 if self._readable() else POLL_MS)
            self._turn()
        self.close()

    def _turn(self) -> None:
        """Whatever there is to do at the moment; waits for nothing but one wave."""
        self._try(self._take_orders)
        self._try(self._read_wave)
        # What the DE said during the wave, before anybody calls it silent.
        self._try(self._listen)
        self._try(self._give_up_overdue)
        self._try(self._ask_after_unfinished)
        self._noise.tick()

    def _try(self, step: Callable[..., Any], *arguments: Any) -> None:
        try:
            step(*arguments)
        except zmq.ContextTerminated:
            raise  # the process ends
        except Exception:
            faults.record("peer lane %s goes on after a step that failed", self._endpoint)
            time.sleep(POLL_MS / 1000)

    def _try_for(self, pull: _Pull, step: Callable[..., None], *arguments: Any) -> None:
        """A step that fails ends this pull only."""
        try:
            step(pull, *arguments)
        except Exception:
            faults.record("request %s: no more pages from %s", pull.load.operation.request_id, self._endpoint)
            self._give_up(pull, "fault in the peer lane")

    def _may_end(self) -> bool:
        if self._pulls or self._unfinished is not None or self._greeting is not None:
            self._idle_since_s = time.monotonic()
        elif time.monotonic() - self._idle_since_s > IDLE_S:
            with self._door:
                self._ended = self._mailbox.empty
        return self._ended

    def _take_orders(self) -> None:
        for item in self._mailbox.drain():
            if isinstance(item, _Greeted):
                self._greeted(item)
            elif isinstance(item, Release):
                self._send(item)
            else:
                self._try_for(item, self._begin)

    def _begin(self, pull: _Pull) -> None:
        if pull.room in self._pulls or pull.room in self._unanswered:
            self._finish(pull, confirmed=False, reason="another request of this room")
            return
        now_s = time.monotonic()
        pull.deadline_s, pull.told_s = now_s + self._timeout_s, now_s
        pull.waits_until_s = now_s + WAITS * self._timeout_s
        self._pulls[pull.room] = pull
        if self._unfinished is not None:
            self._give_up(pull, "peer silent")
            return
        first_page = pull.load.first_page
        self._send(
            Pull(
                room=pull.room,
                first_page=first_page,
                end_page=first_page + pull.end,
                fingerprint=self.fingerprint,
                prompt_hash=pull.prompt_hash,
                version=peer_protocol.VERSION,
            )
        )

    def _listen(self) -> None:
        for _ in range(MESSAGES_AT_A_TIME):
            if not self._socket.poll(0):
                return
            self._receive(b"".join(self._socket.recv_multipart()))

    def _receive(self, frame: bytes) -> None:
        try:
            message = peer_protocol.decode_to_lane(frame)
        except ValueError as error:
            self._warn("DualPath: page server %s sent nonsense: %s", error)
            return
        pull = self._pulls.get(message.room)
        if pull is not None:
            self._try_for(pull, self._heard, message)
        elif isinstance(message, Released):
            self._unanswered.discard(message.room)

    def _heard(self, pull: _Pull, message: peer_protocol.ToLane) -> None:
        if not pull.offers:  # else what counts is that its pages come
            pull.deadline_s = time.monotonic() + self._timeout_s
        if isinstance(message, Released):
            self._finish(pull, confirmed=message.valid)
        elif pull.releasing or pull.ended:
            return
        elif isinstance(message, Pages):
            self._offered(pull, message)
        elif isinstance(message, Ended):
            pull.ended, pull.reason = True, message.reason
            if not pull.offers:
                self._release(pull)

    def _offered(self, pull: _Pull, pages: Pages) -> None:
        count, rest = divmod(len(pages.pointers), len(pages.sizes) or 1)
        follows = pages.first_page == pull.load.first_page + pull.offered
        if rest or not count or not follows or pull.offered + count > pull.end:
            self._release(pull, "peer offered pages that do not fit")
            return
        if not pull.offers:
            self._turns.append(pull)
        pull.offers.append(pages)
        pull.offered += count
        pull.waits_until_s = time.monotonic() + WAITS * self._timeout_s

    # -- reading ----------------------------------------------------------------------------------

    def _readable(self) -> bool:
        return any(not pull.offers or pull.offers[0].mooncake_address in self._known for pull in self._turns)

    def _read_wave(self) -> None:
        """One wave of the first pull, in turn, whose DE is known to answer."""
        for _ in range(len(self._turns)):
            pull = self._turns.popleft()
            if pull.over or pull.load.cancelled or not pull.offers:
                continue
            known = pull.offers[0].mooncake_address in self._known
            self._try_for(pull, self._read if known else self._greet)
            if pull.offers:
                self._turns.append(pull)
            if known:
                return

    def _greet(self, pull: _Pull) -> None:
        """Find out whether the engine that holds the pages answers, on a thread that may wait for it."""
        if self._greeting is None:
            address = pull.offers[0].mooncake_address
            threading.Thread(
                target=self._ask, args=(address,), name=f"dualpath-greeting {address}", daemon=True
            ).start()
            self._greeting = address

    def _ask(self, mooncake_address: str) -> None:
        """On a thread of its own; continues in `_greeted`, on the lane's."""
        answers = False
        try:
            answers = self._forwarder.answers(mooncake_address)
        finally:
            self._mailbox.put(_Greeted(mooncake_address, answers))

    def _greeted(self, greeted: _Greeted) -> None:
        self._greeting = None
        if greeted.answers:
            self._known.add(greeted.mooncake_address)
            return
        for pull in list(self._turns):
            if pull.offers and pull.offers[0].mooncake_address == greeted.mooncake_address:
                self._try_for(pull, self._release, "forward failed")

    def _read(self, pull: _Pull) -> None:
        if self._unfinished is not None:
            self._give_up(pull, "peer silent")
            return
        load, offer = pull.load, pull.offers[0]
        blocks_a_page = len(offer.sizes)
        offer_first = offer.first_page - load.first_page
        offer_end = offer_first + len(offer.pointers) // blocks_a_page
        first = pull.read
        end = min(first + max(1, self._wave_bytes // load.page_bytes), offer_end)
        sizes = list(offer.sizes) * (end - first)
        pool = load.controller.storage_host_pool
        with ExitStack() as lease:
            lease.enter_context(load.controller.mem_pool_host.layout_lease())
            local, local_sizes = pool.get_page_buffer_meta(load.host_indices(first, end))
            if local_sizes != sizes:
                self._release(pull, "peer offered pages that do not fit")
                return
            begin = (first - offer_first) * blocks_a_page
            blocks = merge_runs(local, offer.pointers[begin : begin + len(sizes)], sizes)
            pull.work.begin()
            begun_s = time.monotonic()
            try:
                whole = self._forwarder.read(offer.mooncake_address, *blocks, self._timeout_s)
            except StillWriting as writing:
                pull.work.moved(0, 0)
                self._keep_back(pull, first, end, writing, lease)
                return
        if not whole:
            pull.work.moved(0, 0)
            pull.deadline_s = time.monotonic() + self._timeout_s
            self._release(pull, "forward failed")
            return
        pull.read = end
        pull.work.moved(end - first, sum(sizes))
        pull.work.blocks += len(blocks[0])
        if end == offer_end:
            pull.offers.popleft()
        self._progress(sum(sizes), time.monotonic() - begun_s)
        if pull.ended and not pull.offers:
            self._release(pull)

    def _keep_back(self, pull: _Pull, first: int, end: int, writing: StillWriting, lease: ExitStack) -> None:
        """Pages `[first, end)` stay where they are, with nobody, until nothing can write into them."""
        logger.warning(
            "DualPath: a read from %s was given up (%s): %s; %d pages are kept back until then",
            self._endpoint,
            writing.__cause__,
            writing,
            end - first,
        )
        pull.safe_end = first
        kept = lease.pop_all()
        kept.callback(pull.load.withhold(first, end))
        self._unfinished = _Unfinished(writing, end - first, kept)
        self._give_up(pull, "peer silent")

    def _progress(self, byte_count: int, elapsed_s: float) -> None:
        """The DE lives: whoever waits for its turn on this lane waits on, and the DE shall keep its pages."""
        wished_bytes = int(byte_count * WAVE_S / max(elapsed_s, 1e-6))
        self._wave_bytes = min(max(LEAST_WAVE_BYTES, wished_bytes), MOST_WAVE_BYTES)
        now_s = time.monotonic()
        for pull in self._pulls.values():
            if pull.offers or pull.read:
                pull.deadline_s = now_s + self._timeout_s
                pull.waits_until_s = now_s + WAITS * self._timeout_s
                if now_s - pull.told_s > READING_S and not pull.releasing:
                    pull.told_s = now_s
                    self._send(Reading(room=pull.room))

    def _ask_after_unfinished(self) -> None:
        unfinished = self._unfinished
        if unfinished is not None and unfinished.writing.over():
            self._unfinished = None
            unfinished.kept.close()
            logger.info("DualPath: %d pages that %s held are free again", unfinished.pages, self._endpoint)

    # -- the end of a pull ------------------------------------------------------------------------

    def _release(self, pull: _Pull, reason: str | None = None) -> None:
        """Read no more; what was read counts if the DE confirms it."""
        pull.reason = reason or pull.reason
        pull.releasing = True
        pull.offers.clear()
        self._send(Release(room=pull.room))

    def _give_up(self, pull: _Pull, reason: str) -> None:
        """Nothing of it counts, and the DE's answer is not waited for."""
        if self._pulls.get(pull.room) is pull:
            self._unanswered.add(pull.room)
            self._send(Release(room=pull.room))
        self._finish(pull, confirmed=False, reason=reason)

    def _finish(self, pull: _Pull, confirmed: bool, reason: str | None = None) -> None:
        if pull.over:
            return
        pull.over = True
        if self._pulls.get(pull.room) is pull:
            del self._pulls[pull.room]
        pull.offers.clear()
        load = pull.load
        landed = pull.read if confirmed else 0
        reason = reason or pull.reason
        try:
            if landed:
                load.land(0, landed)
            if not confirmed:
                pull.work.void()
            if landed < pull.end and not load.cancelled:
                reason = reason or ("peer offered too few pages" if confirmed else "lease ended")
                self._on_missing(load, landed, pull.safe_end, reason)
        finally:
            load.close_part()

    def _give_up_overdue(self) -> None:
        now_s = time.monotonic()
        for pull in list(self._pulls.values()):
            if pull.load.cancelled and not pull.releasing:
                self._try_for(pull, self._release, "cancelled")
            elif now_s > pull.deadline_s:
                self._try_for(pull, self._give_up, "peer silent")
            elif now_s > pull.waits_until_s:
                self._try_for(pull, self._give_up, "peer offers nothing")

    def _warn(self, text: str, *arguments: object) -> None:
        self._noise.log(logging.WARNING, text, self._endpoint, *arguments)

    def _send(self, message: Wire) -> None:
        try:
            self._socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            self._warn("DualPath: page server %s takes no messages")
