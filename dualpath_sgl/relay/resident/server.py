"""Answers prefill engines out of a decode engine's host memory: a relay that reads nothing.

Every answer is given at once, from the index; SGLang's scheduler is not asked.  Python's lock is held for
some tens of microseconds at a time, so that a decode step hardly waits for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

import zmq

from dualpath_sgl.lanes.door import Door
from dualpath_sgl.lanes.peer_keys import PeerKeys
from dualpath_sgl.relay import wire
from dualpath_sgl.relay.leases import Leases
from dualpath_sgl.relay.resident.index import Index, Place
from dualpath_sgl.relay.wire import (
    NOT_HELD,
    Fetch,
    Held,
    Hello,
    Holds,
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
from scheduler_svc.telemetry.log_limit import LimitedLog

logger = logging.getLogger(__name__)

POLL_MS = 100
LEASE_S = 5.0
"""A client has so long to pull a batch."""
MOST_FETCHES = 8
"""Of a client, answered and not released."""
AHEAD = 2
"""Fetches that a client shall have under way: one is answered while it pulls another one."""
MOST_CLIENTS = 4096
"""The one that was quiet for longest is forgotten when there are more."""
KEYS_AT_A_TIME = 64
"""Then Python's lock is free for a moment."""
MOMENT_S = 1e-5
FAULT_PAUSE_S = 0.05


@dataclass
class Served:
    """Since the engine began; the server's thread counts."""

    questions: int = 0
    objects: int = 0
    """Whose addresses were given."""
    bytes: int = 0
    """Of those that lived until they were released."""
    not_held: int = 0
    """Objects asked for that did not lie there."""
    invalid: int = 0
    """Leases in which a page's life ended, or that were released too late."""
    expired: int = 0
    """Leases that nobody released."""


class ResidentServer(threading.Thread):
    def __init__(
        self,
        host: str,
        port: int,
        index: Index,
        mooncake_address: str,
        address: int,
        keys: PeerKeys | None = None,
    ) -> None:
        """Binds at once.  `mooncake_address`: Mooncake's name of the memory that `index` speaks of; `address`:
        of a byte in it that anybody may read.  Raises door.BindRefused.
        """
        super().__init__(name="dualpath-resident-server", daemon=True)
        self._index = index
        self._mooncake_address = mooncake_address
        self._address = address
        self.served = Served()
        self._leases: Leases[Place] = Leases(LEASE_S)
        self._clients: OrderedDict[bytes, int] = OrderedDict()
        """Leases of each."""
        self._log = LimitedLog(logger)
        self._door = Door(host, port, wire.decode_to_relay, wire.MAX_MESSAGE_BYTES, keys)
        self.endpoint = self._door.endpoint
        self._stopping = threading.Event()

    @property
    def leased(self) -> int:
        """Leases that run."""
        return len(self._leases)

    def stop(self) -> None:
        """It ends soon: who waits for an answer will see its connection end."""
        self._stopping.set()

    def run(self) -> None:
        poller = zmq.Poller()
        self._door.watch(poller)
        while not self._stopping.is_set():
            try:
                poller.poll(POLL_MS)
                for identity, message in self._door.receive():
                    self._guarded(partial(self._handle, identity, message))
                self._expire()
                self._door.tick()
                self._log.tick()
            except zmq.ContextTerminated:
                return
            except Exception:
                faults.record("the server of held objects goes on after a step that failed", log=self._log)
                time.sleep(FAULT_PAUSE_S)
        self._door.close()

    def _guarded(self, step: partial[None]) -> None:
        try:
            step()
        except Exception:
            faults.record("a prefill engine reads elsewhere what it asked for", log=self._log)

    def _handle(self, identity: bytes, message: wire.ToRelay) -> None:
        if identity in self._clients:
            self._clients.move_to_end(identity)
        match message:
            case Hello():
                self._hello(identity, message)
            case Holds():
                self._holds(identity, message)
            case Fetch():
                self._fetch(identity, message)
            case Release():
                self._release(identity, message.lease)
            case Revoke():
                pass  # nothing waits here: it was answered

    def _hello(self, identity: bytes, hello: Hello) -> None:
        if (reason := wire.disagreement(hello)) is not None:
            self._log.log(logging.WARNING, "DualPath: rejected %s: %s", hello.engine, reason)
            self._door.send(identity, Rejected(reason))
            return
        self._clients.setdefault(identity, 0)
        if len(self._clients) > MOST_CLIENTS:
            self._forget(next(iter(self._clients)))
        self._send(
            identity,
            Welcome(
                version=min(hello.version, wire.VERSION),
                mooncake_address=self._mooncake_address,
                address=self._address,
                lease_s=LEASE_S,
                most_bytes=wire.MAX_OBJECT_BYTES,
                most_fetches=MOST_FETCHES,
                ahead=AHEAD,
            ),
        )

    def _holds(self, identity: bytes, question: Holds) -> None:
        runs: list[tuple[int, int]] = []
        for position, place in enumerate(self._places(question.keys)):
            if place is None:
                continue
            if runs and sum(runs[-1]) == position:
                runs[-1] = runs[-1][0], runs[-1][1] + 1
            else:
                runs.append((position, 1))
        self.served.questions += 1
        self._send(identity, Held(question.question, tuple(runs)))

    def _fetch(self, identity: bytes, fetch: Fetch) -> None:
        if (reason := self._refusal(identity, fetch.lease)) is not None:
            self._send(identity, Refused(fetch.lease, reason))
            return
        addresses: list[int] = []
        got: list[int] = []
        held: list[Place] = []
        for place, size in zip(self._places(fetch.keys), fetch.sizes, strict=True):
            if place is not None and place.byte_count == size:
                held.append(place)
                addresses.append(place.address)
                got.append(size)
            else:
                addresses.append(0)
                got.append(NOT_HELD)
        self._leases.begin((identity, fetch.lease), held, time.monotonic())
        self._clients[identity] += 1
        self.served.objects += len(held)
        self.served.not_held += len(got) - len(held)
        ready = Ready(
            lease=fetch.lease,
            mooncake_address=self._mooncake_address,
            addresses=tuple(addresses),
            got=tuple(got),
        )
        self._send(identity, ready)

    def _refusal(self, identity: bytes, lease: int) -> Reason | None:
        if identity not in self._clients:
            return Reason.UNKNOWN
        if (identity, lease) in self._leases:
            return Reason.IN_USE
        if self._clients[identity] >= MOST_FETCHES:
            return Reason.BUSY
        return None

    def _release(self, identity: bytes, lease: int) -> None:
        known = (identity, lease) in self._leases
        in_time, places = self._leases.end((identity, lease), time.monotonic())
        valid = in_time and all(place.lasts for place in places)
        if known:
            self._clients[identity] -= 1
            if valid:
                self.served.bytes += sum(place.byte_count for place in places)
            else:
                self.served.invalid += 1
        self._send(identity, Released(lease, valid))

    def _places(self, keys: tuple[str, ...]) -> list[Place | None]:
        """Of each key, where it lies now."""
        places: list[Place | None] = []
        for first in range(0, len(keys), KEYS_AT_A_TIME):
            if first:
                time.sleep(MOMENT_S)
            places += [self._index.find(key) for key in keys[first : first + KEYS_AT_A_TIME]]
        return places

    def _expire(self) -> None:
        for name in self._leases.expired(time.monotonic()):
            self._leases.end(name, 0.0)
            self._clients[name[0]] -= 1
            self.served.expired += 1

    def _send(self, identity: bytes, message: wire.ToClient) -> None:
        if not self._door.send(identity, message):
            self._forget(identity)

    def _forget(self, identity: bytes) -> None:
        """The connection is gone: nobody will pull what was asked over it."""
        for name in self._leases.of(identity):
            self._leases.end(name, 0.0)
        self._clients.pop(identity, None)
