"""One helper's lane: a thread that claims batches for it, asks, pulls, confirms and copies.

    claim -> Fetch -> Ready -> pull into bounce memory -> Release -> Released -> copy -> landed

Several batches are asked for at a time, so that the relay's link does not wait for messages.  A relay that
says nothing while it owes an answer, or whose bytes do not come, is *lost*: what was claimed for it goes
back to its load, and it is asked again when it has answered a Hello.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import zmq
from zmq.utils.monitor import recv_monitor_message

from dualpath_sgl.lanes.forward import Forwarder, StillWriting
from dualpath_sgl.lanes.peer_keys import Secure
from dualpath_sgl.relay import wire
from dualpath_sgl.relay.client.batch import Batch
from dualpath_sgl.relay.client.batch_size import BatchSize
from dualpath_sgl.relay.client.claims import Claim, Limits, Load
from dualpath_sgl.relay.client.counts import LaneCounts
from dualpath_sgl.relay.client.memory.transports import Transports
from dualpath_sgl.relay.client.relays import Helper, Kind
from dualpath_sgl.relay.client.standing import Standing
from dualpath_sgl.relay.wire import (
    Alive,
    Held,
    Hello,
    Holds,
    Leaving,
    Ready,
    Reason,
    Refused,
    Rejected,
    Release,
    Released,
    Revoke,
    Welcome,
)
from dualpath_sgl.threads import faults
from dualpath_sgl.threads.mailbox import Mailbox
from dualpath_sgl.threads.priority import wait_politely
from scheduler_svc.telemetry.log_limit import LimitedLog
from scheduler_svc.wire.liveness import notice_dead_peers, stop_monitor
from scheduler_svc.wire.protocol import Wire, encode

logger = logging.getLogger(__name__)

POLL_MS = 50
REJECTED_S = 10.0
"""After a relay has rejected us; it will do so until one of both is upgraded."""
PAUSE_S = 2.0
"""A relay that delivers too late, or is busy, is left alone so long."""
REFUSED_S = 0.1
"""So is one that has refused a batch for want of room."""
PULL_S = 1.5
"""Longest pull; a relay whose bytes come more slowly than its storage link would bring them is no help."""
MESSAGES_AT_A_TIME = 256

_leases = itertools.count(1)
"""Of this process: no relay sees a number twice."""


@dataclass(frozen=True)
class _Greeted:
    mooncake_address: str
    answers: bool
    transport: Forwarder | None
    """With which it was met."""


class RelayLane(threading.Thread):
    def __init__(
        self,
        helper: Helper,
        hello: Hello,
        loads: Callable[[], Iterable[Load]],
        limits: Callable[[int], Limits],
        traceparent: Callable[[Load], str | None],
        heard: Callable[[str, Held], None],
        transports: Transports,
        silence_s: float,
        batch_size: BatchSize,
        counts: LaneCounts,
        secure: Secure | None = None,
    ) -> None:
        """`loads`: those that are open, oldest first.  `limits`: of a claim of so many bytes.  `traceparent`: of a load's
        trace.  `heard`: an answer of a helper's.  All four are called on the lane's thread.
        """
        super().__init__(name=f"dualpath-relay-lane {helper.label}", daemon=True)
        self.helper = helper
        self._hello = hello
        self._loads = loads
        self._limits = limits
        self._traceparent = traceparent
        self._on_held = heard
        self._transports = transports
        self._transport: Forwarder | None = None
        """Of the memory that was met."""
        self._bounce = transports.bounce
        self._silence_s = silence_s
        self._batch_size = batch_size
        self._counts = counts
        self._asked: dict[int, Batch] = {}
        self._ready: deque[Batch] = deque()
        self._confirming: dict[int, Batch] = {}
        self._standing = Standing()
        self._heard_s = 0.0
        self.share = 1.0
        """Of what the relay allows to be asked ahead; 0: nothing.  Whoever knows sets it, on any thread."""
        self._up = False
        self._retiring = False
        self._stopping = False
        self._ended = False
        self._door = threading.Lock()
        """Of the mailbox: nothing is put in once the lane has ended."""
        self._orders: Mailbox[Load | Holds | _Greeted | None] = Mailbox()
        self._log = LimitedLog(logger)
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, 2 * wire.MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.IPV6, int("[" in helper.endpoint))
        notice_dead_peers(self._socket)
        if secure is not None:
            secure(self._socket)

    # -- any thread -------------------------------------------------------------------------------

    @property
    def up(self) -> bool:
        """The relay answers and may be asked."""
        return self._up

    def wake(self) -> None:
        """There is something to claim."""
        self._order(None)

    def urge(self, load: Load) -> None:
        """The own client has nothing left to do for this load: it may have a batch that has not begun."""
        self._order(load)

    def retire(self) -> None:
        """Claim nothing more; the thread ends once nothing is owed to it."""
        self._retiring = True
        self._order(None)

    def ask(self, question: Holds) -> None:
        """The answer is heard."""
        self._order(question)

    def stop(self) -> None:
        """What it has claimed goes back; the thread ends soon."""
        self._stopping = True
        self._order(None)

    @property
    def _share(self) -> float:
        return 0.0 if self._retiring else self.share

    @property
    def _owed(self) -> bool:
        return bool(self._asked or self._ready or self._confirming)

    def _order(self, order: Load | Holds | _Greeted | None) -> bool:
        """False when the lane has ended."""
        with self._door:
            if not self._ended:
                self._orders.put(order)
            return not self._ended

    # -- the lane's own thread --------------------------------------------------------------------

    def run(self) -> None:
        wait_politely()
        monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        poller = zmq.Poller()
        for watched in (self._socket, self._orders.fd, monitor):
            poller.register(watched, zmq.POLLIN)
        self._socket.connect(self.helper.endpoint)
        while not self._stopping and not (self._retiring and not self._owed):
            self._try(partial(poller.poll, 0 if self._ready else POLL_MS))
            self._turn(monitor)
        self._up = False
        self._try(partial(self._lose, "is no helper any more", 0.0))
        with self._door:
            self._ended = True
            self._try(self._take_orders)
            self._orders.close()
        if self._transport is not None:
            self._transports.give_back(self._transport)
        stop_monitor(self._socket, monitor)
        self._socket.close()

    def _turn(self, monitor: zmq.Socket[bytes]) -> None:
        """Whatever there is to do at the moment; waits for nothing but one pull."""
        # What was said before a connection ended counts: a relay that drains ends with its last word.
        self._try(self._listen)
        self._try(partial(self._follow, monitor))
        self._try(self._take_orders)
        self._try(self._hail)
        self._try(self._ask)
        self._try(self._pull)
        # What the relay said during the pull, before anybody calls it silent.
        self._try(self._listen)
        self._try(self._give_up_silent)
        self._try(self._bounce.settle)
        self._up = self._standing.may_ask and self._share > 0
        self._log.tick()

    def _try(self, step: Callable[[], object]) -> None:
        try:
            step()
        except zmq.ContextTerminated:
            self._stopping = True
        except Exception:
            faults.record("what was claimed for relay %s is read elsewhere", self.helper.name)
            self._lose("met a fault of ours", PAUSE_S)
            time.sleep(POLL_MS / 1000)

    def _follow(self, monitor: zmq.Socket[bytes]) -> None:
        while True:
            try:
                event = recv_monitor_message(monitor, zmq.NOBLOCK)["event"]
            except zmq.Again:
                return
            if self._standing.connects(event == zmq.EVENT_HANDSHAKE_SUCCEEDED):
                self._lose("is gone", 0.0)

    def _take_orders(self) -> None:
        for order in self._orders.drain():
            if isinstance(order, _Greeted):
                self._greeted(order)
            elif isinstance(order, Load):
                self._revoke_newest(order)
            elif isinstance(order, Holds):
                self._send(order)

    def _revoke_newest(self, load: Load) -> None:
        """One at a time: while the own client reads it, the relay may come to the others."""
        newest = max((lease for lease, batch in self._asked.items() if batch.load is load), default=None)
        if newest is not None:
            self._send(Revoke(newest))

    # -- whether it may be asked -------------------------------------------------------------------

    def _hail(self) -> None:
        if self._standing.is_time_to_hail():
            self._send(self._hello)

    def _welcomed(self, welcome: Welcome) -> None:
        if self._standing.welcomed(welcome):
            threading.Thread(
                target=self._greet,
                args=(welcome.mooncake_address, welcome.address),
                name=f"dualpath-greeting {welcome.mooncake_address}",
                daemon=True,
            ).start()

    def _greet(self, mooncake_address: str, address: int) -> None:
        """Mooncake's first contact is made inside the first read, and takes up to a minute when the relay freezes
        just then: on a thread and with a transfer engine of its own.
        """
        answers = False
        transport = room = None
        try:
            room = self._bounce.take(1)
            transport = self._transports.take()
            answers = (
                room is not None
                and transport.answers(mooncake_address)
                and transport.read(mooncake_address, [room.address], [address], [1], self._silence_s)
            )
        except StillWriting as writing:
            assert room is not None
            self._bounce.keep_back(room, writing)
            room = None
        except Exception:
            faults.record("relay %s is not asked for a while", self.helper.name)
        finally:
            if room is not None:
                self._bounce.give_back(room)
            if not self._order(_Greeted(mooncake_address, answers, transport)) and transport is not None:
                self._transports.give_back(transport)

    def _greeted(self, greeted: _Greeted) -> None:
        spare = greeted.transport
        if self._standing.greeted(greeted.mooncake_address, greeted.answers, PAUSE_S):
            spare, self._transport = self._transport, greeted.transport
        if spare is not None:
            self._transports.give_back(spare)
        if not greeted.answers:
            text = "DualPath: relay %s: its memory %s does not answer"
            self._log.log(logging.WARNING, text, self.helper.name, greeted.mooncake_address)

    # -- asking ------------------------------------------------------------------------------------

    def _ask(self) -> None:
        welcome = self._standing.welcome
        if welcome is None or not self._standing.may_ask:
            return
        limits = self._limits(self._batch_size.wanted_bytes)
        limits = limits._replace(most_bytes=min(limits.most_bytes, welcome.most_bytes))
        holds = self.helper.kind is Kind.RESIDENT
        for load in self._loads():
            claim_next = load.claim_held if holds else load.claim
            while self._wants_more(welcome):
                claim = claim_next(self.helper.label, limits)
                if claim is None:
                    break
                if not self._ask_for(load, claim):
                    return

    def _wants_more(self, welcome: Welcome) -> bool:
        held = len(self._asked) + len(self._ready) + len(self._confirming)
        ahead = math.ceil(welcome.ahead * self._share)
        return len(self._asked) < ahead and held < welcome.most_fetches

    def _ask_for(self, load: Load, claim: Claim) -> bool:
        """False when there is no bounce memory for it at the moment."""
        room = self._bounce.take(claim.byte_count)
        if room is None:
            load.give_back(claim)
            return False
        batch = Batch(next(_leases), load, claim, room, time.monotonic())
        self._asked[batch.lease] = batch
        self._send(batch.fetch(self._traceparent(load)))
        return True

    # -- what the relay says -----------------------------------------------------------------------

    def _listen(self) -> None:
        for _ in range(MESSAGES_AT_A_TIME):
            try:
                frame = b"".join(self._socket.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            try:
                message = wire.decode_to_client(frame)
            except ValueError as error:
                self._log.log(
                    logging.WARNING, "DualPath: relay %s sent nonsense: %s", self.helper.name, error
                )
                continue
            self._heard_s = time.monotonic()
            self._handle(message)

    def _handle(self, message: wire.ToClient) -> None:
        match message:
            case Welcome():
                self._welcomed(message)
            case Rejected():
                self._log.log(
                    logging.ERROR, "DualPath: relay %s rejects us: %s", self.helper.name, message.reason
                )
                self._lose("rejects us", REJECTED_S)
            case Ready():
                self._is_ready(message)
            case Refused():
                self._refused(message)
            case Released():
                self._released(message)
            case Leaving():
                self._standing.leaves()
            case Held():
                self._on_held(self.helper.label, message)
            case Alive():
                pass

    def _is_ready(self, ready: Ready) -> None:
        batch = self._asked.get(ready.lease)
        if batch is None or batch.claim.void or len(ready.got) != len(batch.claim.indices):
            if batch is not None:
                self._drop(batch)
            self._send(Release(ready.lease))  # nobody wants it any more
            return
        del self._asked[ready.lease]
        now_s = time.monotonic()
        self._counts.wait_s += now_s - batch.since_s
        batch.ready, batch.since_s = ready, now_s
        self._ready.append(batch)

    def _refused(self, refused: Refused) -> None:
        batch = self._asked.get(refused.lease)
        if batch is None:
            return
        self._drop(batch, to_own=refused.reason is Reason.REVOKED)
        if refused.reason is Reason.REVOKED:
            return
        self._counts.refused += 1
        self._log.log(
            logging.INFO, "DualPath: relay %s refused a batch: %s", self.helper.name, refused.reason
        )
        if refused.reason is Reason.UNKNOWN:
            self._lose("does not know us", 0.0)
        else:
            self._standing.pause(REFUSED_S if refused.reason is Reason.BUSY else PAUSE_S)

    def _released(self, released: Released) -> None:
        batch = self._confirming.pop(released.lease, None)
        if batch is None:
            return
        try:
            if released.valid:
                self._land(batch)
            else:
                self._counts.invalid += 1
                if self.helper.kind is Kind.RELAY:  # pulled too late: it or the network is slower than leases
                    self._standing.pause(PAUSE_S)
        finally:
            self._give_back(batch)  # unless it has landed
            self._bounce.give_back(batch.room)

    # -- pulling and landing -----------------------------------------------------------------------

    def _pull(self) -> None:
        """One batch, that messages may be heard before the next one."""
        if not self._ready:
            return
        batch, welcome = self._ready.popleft(), self._standing.welcome
        ready = batch.ready
        assert ready is not None and welcome is not None
        is_late = time.monotonic() > batch.since_s + welcome.lease_s
        if batch.claim.void or is_late or not self._standing.knows(ready.mooncake_address):
            self._drop(batch)
            self._send(Release(batch.lease))
            return
        begun_s = time.monotonic()
        assert self._transport is not None
        try:
            arrived = self._transport.read(
                ready.mooncake_address, *batch.transfers(), self._silence_s, PULL_S
            )
        except StillWriting as writing:
            self._hung(batch, writing)
            return
        except Exception:
            self._drop(batch)
            raise
        self._counts.pull_s += time.monotonic() - begun_s
        if arrived:
            batch.since_s = time.monotonic()
            self._confirming[batch.lease] = batch
            self._send(Release(batch.lease))
        else:
            self._drop(batch)
            self._lose("does not let its memory be read", PAUSE_S, ready.mooncake_address)

    def _hung(self, batch: Batch, writing: StillWriting) -> None:
        """Its memory stays with the transfers; its objects come from elsewhere."""
        self._counts.hung_pulls += 1
        self._bounce.keep_back(batch.room, writing)
        self._give_back(batch)
        self._lose(f"hangs in a pull ({writing.__cause__}; {writing})", PAUSE_S)

    def _land(self, batch: Batch) -> None:
        """Copy what is whole to where the engine wants it, unless the load has taken it back."""
        load, claim = batch.load, batch.claim
        if not load.begin_landing(claim):
            return
        begun_s = time.monotonic()
        whole: list[int] = []
        try:
            whole = batch.copy()
        finally:
            load.land(claim, whole, batch.not_held() if self.helper.kind is Kind.RESIDENT else ())
        self._batch_size.landed(claim.byte_count, claim.since_s)
        counts = self._counts
        counts.copy_s += time.monotonic() - begun_s
        counts.batches += 1
        counts.objects += len(whole)
        counts.failed_objects += len(claim.indices) - len(whole)
        counts.bytes += sum(load.sizes[index] for index in whole)

    # -- what does not come --------------------------------------------------------------------------

    def _drop(self, batch: Batch, to_own: bool = False) -> None:
        """Nothing writes into its memory; its objects go back."""
        self._asked.pop(batch.lease, None)
        self._give_back(batch, to_own)
        self._bounce.give_back(batch.room)

    def _give_back(self, batch: Batch, to_own: bool = False) -> None:
        if batch.load.give_back(batch.claim, to_own):
            self._counts.given_back += len(batch.claim.indices)

    def _lose(self, why: str, pause_s: float, mooncake_address: str | None = None) -> None:
        """It gets no more until it has answered a Hello, and its memory too if that is at fault."""
        batches = [*self._asked.values(), *self._ready, *self._confirming.values()]
        self._asked.clear()
        self._ready.clear()
        self._confirming.clear()
        for batch in batches:
            self._give_back(batch)
            self._bounce.give_back(batch.room)
            self._send(Release(batch.lease))
        if batches or pause_s:
            self._counts.lost += 1
            text = "DualPath: relay %s %s; %d batches are read elsewhere"
            self._log.log(logging.WARNING, text, self.helper.name, why, len(batches))
        self._standing.lose(pause_s, mooncake_address)

    def _give_up_silent(self) -> None:
        owed = [*self._asked.values(), *self._confirming.values()]
        since_s = max(self._heard_s, min((batch.since_s for batch in owed), default=math.inf))
        if owed and time.monotonic() - since_s > self._silence_s:
            self._lose(f"has said nothing for {self._silence_s:g} s", self._silence_s)

    def _send(self, message: Wire) -> None:
        try:
            self._socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            self._log.log(logging.WARNING, "DualPath: relay %s takes no messages", self.helper.name)
