"""The relay's loop: one thread owns socket, queue, ring and leases.

A fetch is *queued*, then *begun* (its objects lie in the ring, or reads bring them), then *ready* and
leased until it is released.  Nothing that a client says or leaves unsaid takes more than its own lease.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import zmq
from msgspec.structs import replace
from opentelemetry.trace import Tracer

from dualpath_sgl.lanes.door import Door
from dualpath_sgl.lanes.peer_keys import PeerKeys
from dualpath_sgl.relay import wire
from dualpath_sgl.relay.fair_queue import Asked, FairQueue
from dualpath_sgl.relay.fetches import Begun, Fetches
from dualpath_sgl.relay.leases import LeaseName, Leases
from dualpath_sgl.relay.metrics import EXPIRED, LATE, READY, RELEASED, Metrics
from dualpath_sgl.relay.readers import Read, Readers
from dualpath_sgl.relay.ring import Ring
from dualpath_sgl.relay.settings import Settings
from dualpath_sgl.relay.store import Store
from dualpath_sgl.relay.wire import (
    Alive,
    Fetch,
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
from dualpath_sgl.threads.mailbox import Mailbox
from scheduler_svc.telemetry import span_names
from scheduler_svc.telemetry.faults import Faults
from scheduler_svc.telemetry.log_limit import LimitedLog
from scheduler_svc.telemetry.tracing import context_from
from scheduler_svc.wire.protocol import MAX_COUNT, MAX_RATE, RelayLoad, Wire

logger = logging.getLogger(__name__)

POLL_MS = 20
"""How often leases and reads that hang are looked for."""
ALIVE_S = 0.2
"""How often a client that waits or holds a lease is told that the relay lives: sending finds who is gone."""
MOST_CLIENTS = 4096
"""The one that was quiet for longest is forgotten when there are more."""
BESIDE_READERS = 1
"""Fetches that a client shall have in the queue while its others are read."""
NOT_RELEASED = 3
"""Fetches of a client that may be ready and not released: it pulls one after another."""
MOST_QUEUED = 512
"""Of all clients together: at most 256 MiB of messages."""
FAULT_PAUSE_S = 0.05


@dataclass(eq=False)
class _Client:
    engine: str
    leases: set[int] = field(default_factory=set)
    """Queued, begun, or ready and not over."""


class Server:
    def __init__(
        self,
        settings: Settings,
        store: Store,
        mooncake_address: str,
        ring: Ring,
        metrics: Metrics,
        tracer: Tracer | None = None,
        keys: PeerKeys | None = None,
    ) -> None:
        """Binds at once.  `mooncake_address`: Mooncake's name of the ring's memory on the compute network.

        With `keys` it speaks CURVE, and only with the holders of those.  Raises door.BindRefused.
        """
        self._settings = settings
        self._mooncake_address = mooncake_address
        self._ring = ring
        self._metrics = metrics
        self._tracer = tracer
        self._most_fetches = settings.readers + BESIDE_READERS + NOT_RELEASED
        self._queue = FairQueue(settings.patience_s)
        self._leases: Leases[Begun] = Leases(settings.lease_s)
        self._clients: OrderedDict[bytes, _Client] = OrderedDict()
        self._alive_s = 0.0
        self._leaving = threading.Event()
        self._leave_until_s = 0.0
        self._told_leaving = False
        self._faults = Faults()
        self._faults.on_fault = self._count_fault
        self._fault_count = 0
        self._log = LimitedLog(logger)
        self._ended: Mailbox[Read] = Mailbox()
        self._readers = Readers(store, settings.readers, settings.hang_s, self._ended.put)
        self._fetches = Fetches(ring, self._readers, metrics)
        self._door = Door(
            settings.host,
            settings.port,
            wire.decode_to_relay,
            wire.MAX_MESSAGE_BYTES,
            keys,
            on_malformed=metrics.malformed.inc,
            on_refused=lambda reason: metrics.refused_connections.labels(reason).inc(),
        )
        self.endpoint = self._door.endpoint
        self._load = RelayLoad(ring_free_bytes=ring.free_bytes)
        """As of the last tick."""

    def stop(self) -> None:
        """Ask for nothing more, let clients pull what they asked for, then return from `run`.

        Callable from a signal handler or another thread.
        """
        self._leaving.set()

    def load(self) -> RelayLoad:
        """What the scheduler is told.  Callable from another thread."""
        return replace(self._load, draining=self._leaving.is_set())

    def run(self) -> None:
        """Serve until nothing is left after `stop`, then close the socket."""
        poller = zmq.Poller()
        self._door.watch(poller)
        poller.register(self._ended.fd, zmq.POLLIN)
        try:
            while not self._may_end():
                try:
                    poller.poll(POLL_MS)
                    self._turn()
                except zmq.ContextTerminated:
                    return
                except Exception:
                    self._faults.record("the loop", "it goes on")
                    time.sleep(FAULT_PAUSE_S)
        finally:
            self._door.close()

    def _turn(self) -> None:
        """Whatever there is to do at the moment; never waits."""
        for read in self._ended.drain():
            self._guarded(partial(self._read_ended, read), "a read's end")
        self._receive_some()
        self._guarded(self._begin_reads, "beginning reads")
        self._tick()

    def _guarded(self, step: Callable[[], None], name: str) -> bool:
        """False when it has failed."""
        try:
            step()
        except Exception:
            self._faults.record(name, "what it was for is lost, the relay goes on")
            return False
        return True

    def _count_fault(self, step: str) -> None:
        self._fault_count += 1
        self._metrics.faults.labels(step).inc()

    def _tick(self) -> None:
        now_s = time.monotonic()
        self._guarded(self._door.tick, "looking at connections")
        for name in self._leases.expired(now_s):
            self._end_lease(name, now_s, EXPIRED)
            self._log.log(logging.WARNING, "lease %d ended before it was released", name[1])
        for read in self._readers.give_up_overdue(now_s):
            self._give_up(read)
        if now_s - self._alive_s >= ALIVE_S:
            self._alive_s = now_s
            for identity in self._queue.clients() | self._fetches.clients() | self._leases.clients():
                self._send(identity, Alive())
        self._load = RelayLoad(
            queue_bytes=self._queue.bytes + self._readers.bytes_under_way,
            read_rate_bytes_per_s=min(self._readers.rate.bytes_per_s, MAX_RATE),
            ring_free_bytes=self._ring.free_bytes,
            clients=len(self._clients),
            read_bytes=min(self._readers.read_bytes, MAX_COUNT),
            faults=self._fault_count,
        )
        self._metrics.queue_bytes.set(self._queue.bytes)
        self._metrics.free_bytes.set(self._ring.free_bytes)
        self._metrics.leases_open.set(len(self._leases))
        self._metrics.hanging.set(self._readers.hanging)
        self._log.tick()
        self._faults.tick()

    def _may_end(self) -> bool:
        if not self._leaving.is_set():
            return False
        if not self._told_leaving:
            self._told_leaving = True
            self._leave_until_s = time.monotonic() + self._settings.drain_s
            for identity in list(self._clients):
                self._send(identity, Leaving())
        busy = len(self._queue) or len(self._fetches) or len(self._leases)
        return not busy or time.monotonic() > self._leave_until_s

    # -- what clients say -----------------------------------------------------------------------

    def _receive_some(self) -> None:
        for identity, message in self._door.receive():
            handled = self._guarded(partial(self._handle, identity, message), "handling a message")
            if not handled and isinstance(message, Fetch):
                self._refuse(identity, message.lease, Reason.FAULT)

    def _handle(self, identity: bytes, message: wire.ToRelay) -> None:
        if identity in self._clients:
            self._clients.move_to_end(identity)
        match message:
            case Hello():
                self._hello(identity, message)
            case Fetch():
                self._fetch(identity, message)
            case Revoke():
                self._revoke(identity, message.lease)
            case Release():
                self._release(identity, message.lease)
            case Holds():
                self._send(identity, Held(message.question, ()))

    def _hello(self, identity: bytes, hello: Hello) -> None:
        if (reason := wire.disagreement(hello)) is not None:
            self._log.log(logging.WARNING, "rejected %s: %s", hello.engine, reason)
            self._send(identity, Rejected(reason))
            return
        if identity not in self._clients:
            self._clients[identity] = _Client(hello.engine)
            if len(self._clients) > MOST_CLIENTS:
                self._forget(next(iter(self._clients)))
        self._send(
            identity,
            Welcome(
                version=min(hello.version, wire.VERSION),
                mooncake_address=self._mooncake_address,
                address=self._ring.address,
                lease_s=self._settings.lease_s,
                most_bytes=self._settings.most_bytes,
                most_fetches=self._most_fetches,
                ahead=self._settings.readers + BESIDE_READERS,
            ),
        )
        if self._leaving.is_set():
            self._send(identity, Leaving())

    def _fetch(self, identity: bytes, fetch: Fetch) -> None:
        client = self._clients.get(identity)
        reason = self._refusal(identity, client, fetch)
        if client is None or reason is not None:
            self._refuse(identity, fetch.lease, reason or Reason.UNKNOWN)
            return
        client.leases.add(fetch.lease)
        asked = Asked(identity, client.engine, fetch, time.monotonic())
        # What needs no read need not wait for others' reads.
        if self._fetches.need_no_read(fetch):
            self._begin(asked)
        else:
            self._queue.put(asked)

    def _refusal(self, identity: bytes, client: _Client | None, fetch: Fetch) -> Reason | None:
        if client is None:
            return Reason.UNKNOWN
        if self._leaving.is_set():
            return Reason.LEAVING
        # What a client asked for before it was forgotten may still be under way.
        if fetch.lease in client.leases or (identity, fetch.lease) in self._fetches:
            return Reason.IN_USE
        if sum(fetch.sizes) > self._settings.most_bytes:
            return Reason.TOO_LARGE
        if len(client.leases) >= self._most_fetches or len(self._queue) >= MOST_QUEUED:
            return Reason.BUSY
        if self._readers.store_hangs:
            return Reason.STORE_HANGS
        return None

    def _revoke(self, identity: bytes, lease: int) -> None:
        if self._queue.remove(identity, lease) is not None:
            self._refuse(identity, lease, Reason.REVOKED)

    def _release(self, identity: bytes, lease: int) -> None:
        valid = self._end_lease((identity, lease), time.monotonic(), RELEASED)
        self._send(identity, Released(lease, valid))
        # A client may give up what is not ready, too.
        if self._queue.remove(identity, lease) is not None:
            self._over(identity, lease)
        else:
            self._fetches.abandon(identity, lease)

    # -- from the queue into the ring ------------------------------------------------------------

    def _begin_reads(self) -> None:
        while self._readers.idle and (asked := self._queue.first(time.monotonic())) is not None:
            if not self._begin(asked):
                return  # the ring is full: the first one waits for memory, and the others behind it
            self._queue.remove(asked.client, asked.fetch.lease)

    def _begin(self, asked: Asked) -> bool:
        begun = self._fetches.begin(asked)
        if begun is not None and not begun.waits_for:
            self._ready(begun)
        return begun is not None

    def _read_ended(self, read: Read) -> None:
        if read.error is not None:
            self._log.log(logging.ERROR, "a read from the store failed: %r", read.error)
        for begun in self._fetches.read_ended(read):
            self._ready(begun)

    def _give_up(self, read: Read) -> None:
        hung_s = time.monotonic() - read.begun_s
        text = "a read of %d bytes has hung for %.1f s and is given up"
        self._log.log(logging.WARNING, text, read.byte_count, hung_s)
        for begun in self._fetches.give_up(read):
            self._refuse(*begun.name, Reason.STORE_HANGS)

    # -- from ready to over ------------------------------------------------------------------------

    def _ready(self, begun: Begun) -> None:
        self._fetches.end(begun)
        if begun.abandoned:
            self._fetches.unpin(begun.extents)
            self._over(*begun.name)
            return
        # Before the client can know of it: the lease runs from here on.
        self._leases.begin(begun.name, [begun], time.monotonic())
        self._metrics.fetches.add(1, READY)
        self._trace(begun)
        identity, lease = begun.name
        self._send(
            identity,
            Ready(
                lease=lease,
                mooncake_address=self._mooncake_address,
                addresses=tuple(begun.addresses),
                got=tuple(begun.got),
            ),
        )

    def _end_lease(self, name: LeaseName, now_s: float, how: str) -> bool:
        """Whether it was held until now."""
        if name not in self._leases:
            return False
        valid, (begun,) = self._leases.end(name, now_s)
        self._fetches.unpin(begun.extents)
        self._over(*name)
        end = LATE if how == RELEASED and not valid else how
        self._metrics.leases.add(1, end)
        self._metrics.served_bytes.add(begun.got_bytes, end)
        return valid

    def _refuse(self, identity: bytes, lease: int, reason: Reason) -> None:
        if reason not in (Reason.IN_USE, Reason.UNKNOWN):
            self._over(identity, lease)
        self._metrics.fetches.add(1, reason.value)
        self._send(identity, Refused(lease, reason))

    def _over(self, identity: bytes, lease: int) -> None:
        client = self._clients.get(identity)
        if client is not None:
            client.leases.discard(lease)

    def _forget(self, identity: bytes) -> None:
        """The connection is gone: nobody will pull what was asked over it."""
        for lease in self._queue.of(identity):
            self._queue.remove(identity, lease)
        self._fetches.abandon(identity)
        for name in self._leases.of(identity):
            for begun in self._leases.end(name, 0.0)[1]:
                self._fetches.unpin(begun.extents)
        self._clients.pop(identity, None)

    def _trace(self, begun: Begun) -> None:
        fetch = begun.asked.fetch
        if self._tracer is None or fetch.traceparent is None:
            return
        waited_s = time.monotonic() - begun.asked.asked_s
        now_ns = time.time_ns()
        span = self._tracer.start_span(
            span_names.STORE_TO_RELAY,
            context=context_from(fetch.traceparent),
            start_time=now_ns - int(waited_s * 1e9),
            attributes={
                "dualpath.objects": len(fetch.keys),
                "dualpath.bytes": begun.got_bytes,
                "dualpath.left_bytes": fetch.left_bytes,
            },
        )
        span.end(end_time=now_ns)

    def _send(self, identity: bytes, message: Wire) -> None:
        if not self._door.send(identity, message):
            self._forget(identity)
