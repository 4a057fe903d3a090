"""One engine loads two objects through a relay whose ring holds few: `Server`, `Ring`, `RelayLane`, `Load` as they are.

Played: ZeroMQ, Mooncake, the store, and the memory of both processes, of which the content of every byte is known.
Only the own client of the store stands outside: it takes what it may claim, and always brings it.
"""

from __future__ import annotations

import threading
import types
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import zmq
from played_network import AtOnce, Never, PlayedZmq, Quiet, Wire, no_faults
from played_time import CLOCK, Letters
from pull_world import Hanging

from dualpath_sgl.relay import fetches, readers, server
from dualpath_sgl.relay.client import batch, batch_size, claims, lane, standing
from dualpath_sgl.relay.client.batch_size import BatchSize
from dualpath_sgl.relay.client.claims import Blocks, Limits, Load
from dualpath_sgl.relay.client.counts import LaneCounts
from dualpath_sgl.relay.client.lane import RelayLane
from dualpath_sgl.relay.client.memory import bounce
from dualpath_sgl.relay.client.memory.bounce import SLOT_BYTES, Bounce
from dualpath_sgl.relay.client.relays import Helper
from dualpath_sgl.relay.metrics import Metrics
from dualpath_sgl.relay.ring import Ring
from dualpath_sgl.relay.server import Server
from dualpath_sgl.relay.settings import Settings
from dualpath_sgl.relay.wire import Hello, decode_to_relay
from dualpath_sgl.threads import faults
from scheduler_svc.telemetry.faults import Faults
from scheduler_svc.wire.protocol import encode

LONG_S = 6.0
"""Longer than a lease, a read and an answer may take."""
SETTLING_STEPS = 80
SETTINGS = Settings(readers=1, lease_s=5.0, hang_s=1.25, keep_s=2.0, drain_s=10.0)
METRICS = Metrics()
"""Counters decide nothing, so all worlds have the same."""
PLACES = 5_000_000
"""Where SGLang wants the objects."""


class Numbers:
    """Of leases."""

    last = 0

    def __next__(self) -> int:
        self.last += 1
        return self.last


NUMBERS = Numbers()


class PlayedDoor:
    """The relay's socket."""

    def __init__(self, *_anything: object, **_named: object) -> None:
        self.wire = Wire()
        self.endpoint = "tcp://127.0.0.1:1"

    def receive(self) -> Iterator[tuple[bytes, object]]:
        while self.wire.inbox:
            identity, data = self.wire.inbox.popleft()
            yield identity, decode_to_relay(data)

    def send(self, who: bytes, message: object) -> bool:
        self.wire.sent.append([who, encode(message)])
        return True

    def tick(self) -> None:
        pass


class PlayedQueue:
    """Of reads: a reader's thread takes one when the world says so."""

    def __init__(self) -> None:
        self.waiting: list[readers.Read] = []
        self.next: readers.Read | None = None

    def put(self, read: readers.Read | None) -> None:
        if read is not None:
            self.waiting.append(read)

    def get(self) -> readers.Read | None:
        read, self.next = self.next, None
        return read


def play(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for all that the world plays."""
    for module in (server, fetches, readers, lane, claims, standing, batch_size):
        monkeypatch.setattr(module, "time", CLOCK)
    for module in (server, lane):
        monkeypatch.setattr(module, "Mailbox", Letters)
        monkeypatch.setattr(module, "LimitedLog", Quiet)
    monkeypatch.setattr(server, "Door", PlayedDoor)
    monkeypatch.setattr(Faults, "record", no_faults)
    monkeypatch.setattr(faults, "record", no_faults)
    monkeypatch.setattr(readers, "SimpleQueue", PlayedQueue)
    monkeypatch.setattr(readers, "wait_politely", lambda: None)
    monkeypatch.setattr(readers, "threading", types.SimpleNamespace(Thread=Never))
    monkeypatch.setattr(readers, "DrainRate", Rate)
    monkeypatch.setattr(lane, "zmq", PlayedZmq())
    monkeypatch.setattr(lane, "notice_dead_peers", lambda socket: None)
    monkeypatch.setattr(lane, "recv_monitor_message", Monitor.next)
    monkeypatch.setattr(lane, "threading", types.SimpleNamespace(Lock=threading.Lock, Thread=AtOnce))
    monkeypatch.setattr(lane, "_leases", NUMBERS)
    monkeypatch.setattr(bounce, "Memory", PlayedMemory)
    monkeypatch.setattr(bounce, "logger", Quiet())
    monkeypatch.setattr(batch, "copy_blocks", lambda *blocks: RingWorld.present.copy(*blocks))


class Rate:
    bytes_per_s = 0.0

    def begin(self) -> None:
        pass

    def end(self, _bytes: int) -> None:
        pass


class Monitor:
    """Of the lane's connection."""

    def __init__(self) -> None:
        self.events: deque[int] = deque([zmq.EVENT_HANDSHAKE_SUCCEEDED])

    def next(self, _flags: int) -> dict[str, int]:
        if not self.events:
            raise zmq.Again
        return {"event": self.events.popleft()}


class PlayedMemory:
    address = 1_000_000

    def __init__(self, byte_count: int) -> None:
        self.byte_count = byte_count


@dataclass(frozen=True)
class Plot:
    faults: tuple[str, ...] = ()
    """Kinds that may happen: lose, again, late, cut, crash, missing, fail, hang, drain, own, overdue, urge."""
    most_faults: int = 0
    longs: int = 0
    slots: int = 1
    """Of the ring: each holds one object."""
    keys: tuple[str, ...] = ("a", "b")
    """One load each."""


class Relay:
    """A process."""

    def __init__(self, life: int, slots: int) -> None:
        self.life = life
        self.address = f"ring-{life}"
        self.ring = Ring(0, slots, 1, SETTINGS.keep_s)
        self.bytes: dict[int, str] = {}
        self.server = Server(SETTINGS, self, self.address, self.ring, METRICS)
        self.missing = False
        """The store does not have the next thing that it is asked for."""

    @property
    def reads(self) -> PlayedQueue:
        return self.server._readers._reads

    def read(self, keys: list[str], addresses: list[int], sizes: list[int]) -> list[int]:
        """The store's answer."""
        if self.missing:
            self.missing = False
            return [-704] * len(keys)
        self.bytes.update(zip(addresses, keys, strict=True))
        return sizes


class Client:
    """The engine: its loads, its bounce memory, and its lane."""

    def __init__(self, world: RingWorld) -> None:
        self._world = world
        self.bytes: dict[int, str | None] = {}
        self.bounce = Bounce(4 * SLOT_BYTES)
        self.loads = [
            Load([key], [Blocks([PLACES + number], [1])]) for number, key in enumerate(world.plot.keys)
        ]
        self.hung: list[tuple[Hanging, Relay]] = []
        self.monitor = Monitor()
        self.lane = RelayLane(
            Helper("relay", "tcp://127.0.0.1:1"), Hello(engine="pe", rank=0), self.open_loads,
            lambda wanted: Limits(wanted, SLOT_BYTES, 2), lambda load: None, lambda label, held: None,
            self, 1.25, BatchSize(claims.LEAST_BATCH_BYTES), LaneCounts(),
        )  # fmt: skip

    def open_loads(self) -> list[Load]:
        return [load for load in self.loads if not load._closed]

    def take(self) -> Client:
        """A transfer engine."""
        return self

    def give_back(self, _transport: Client) -> None:
        pass

    def answers(self, _address: str) -> bool:
        return True

    def read(self, address: str, local: list[int], remote: list[int], sizes: list[int], *_s: float) -> bool:
        relay, outcome = self._world.relay, self._world.outcome
        self._world.outcome = ""
        blocks = [
            (here + offset, there + offset)
            for here, there, size in zip(local, remote, sizes, strict=True)
            for offset in range(size)
        ]
        if relay.address != address or outcome == "fail":
            return False
        if outcome == "hang":
            self.hung.append((Hanging(blocks), relay))
            raise self.hung[-1][0] from TimeoutError()
        for here, there in blocks:
            self.bytes[here] = relay.bytes.get(there)
        return True


class RingWorld:
    present: RingWorld
    unseen = frozenset(
        {
            "_metrics", "_counts", "_tracer", "_log", "_faults", "_settings", "_hello", "_orders_fd", "helper", "brought",
            "landed_s", "read_bytes", "begun_ns", "_loads", "_limits", "_traceparent", "_on_held", "_transports",
            "_transport", "_batch_size", "_load", "_world", "monitor", "ended_s", "_store", "came_back", "_bounce", "rate",
            "_on_end", "_change", "_alive_s", "_heard_s", "_lock", "_up", "keys", "destinations", "error", "_fault_count",
            "_hail_s",
        }
    )  # fmt: skip
    opaque = (type(threading.Lock()), threading.Condition, threading.Event, Quiet)

    def __init__(self, plot: Plot) -> None:
        CLOCK.reset()
        RingWorld.present = self
        NUMBERS.last = 0
        self.plot = plot
        self.faults_left, self.longs = plot.most_faults, plot.longs
        self.outcome = ""
        self.relay = Relay(0, plot.slots)
        self.client = Client(self)
        self.turn("client")  # it is connected, and says Hello

    def copy(self, targets: list[int], sources: list[int], sizes: list[int]) -> None:
        for target, source, size in zip(targets, sources, sizes, strict=True):
            for offset in range(size):
                self.client.bytes[target + offset] = self.client.bytes.get(source + offset)

    def roots(self) -> object:
        relay, client, lane = self.relay, self.client, self.client.lane
        return [
            (CLOCK.now_s, self.faults_left, self.longs, relay.life),
            relay.server, relay.ring, relay.bytes, relay.reads.waiting,
            client.loads, client.bounce._slots._taken, client.bounce._kept_back, client.bytes,
            [lane._asked, lane._ready, lane._confirming, lane._standing, lane._orders, lane._socket],
            [hanging.blocks for hanging, _ in client.hung], client.monitor.events,
            CLOCK.now_s - self.client.lane._heard_s > 1.25,
        ]  # fmt: skip

    # -- what can happen

    def links(self) -> dict[str, deque[list[bytes]]]:
        return {"client": self.client.lane._socket.sent, "relay": self.relay.server._door.wire.sent}

    def actions(self) -> Iterator[str]:
        yield from (f"hears {who}" for who, link in self.links().items() if link)
        lane = self.client.lane
        may_ask = lane._standing.may_ask and any(
            load._parts[""] or load._returned for load in self.client.open_loads()
        )
        if lane._ready or may_ask or not lane._orders.empty or CLOCK.moved:
            yield "turn client"
        if not self.relay.server._ended.empty or CLOCK.moved or len(self.relay.server._queue):
            yield "turn relay"
        yield from (f"store {index}" for index in range(len(self.relay.reads.waiting)))
        yield from (
            f"writes {index}" for index, (hanging, _) in enumerate(self.client.hung) if hanging.blocks
        )
        for index, load in enumerate(self.client.loads):
            if not load._undone and not load._closed:
                yield f"over {index}"
            elif load._own:
                yield f"own {index}"
        if self.longs:
            yield "long"
        if self.faults_left:
            yield from self.possible_faults()

    def possible_faults(self) -> Iterator[str]:
        kinds = self.plot.faults
        for who, link in self.links().items():
            for kind in ("lose", "again", "late"):
                if kind in kinds and len(link) > (kind == "late"):
                    yield f"{kind} {who}"
        yield from (kind for kind in ("cut", "crash") if kind in kinds)
        if "drain" in kinds and not self.relay.server._leaving.is_set():
            yield "drain"
        if "missing" in kinds and self.relay.reads.waiting and not self.relay.missing:
            yield "missing"
        yield from (kind for kind in ("fail", "hang") if kind in kinds and self.client.lane._ready)
        for index, load in enumerate(self.client.loads):
            if load._undone:
                yield from (f"{kind} {index}" for kind in ("early", "overdue", "urge") if kind in kinds)

    def do(self, action: str) -> None:
        what, *arguments = action.split()
        self.faults_left -= what in self.plot.faults
        getattr(self, what)(*arguments)

    def hears(self, sender: str) -> None:
        """The next message of `sender` arrives."""
        parts = self.links()[sender].popleft()
        if sender == "client":
            self.relay.server._door.wire.inbox.append([b"client", *parts])
            self.relay.server._turn()
        else:
            self.client.lane._socket.inbox.append(parts[1:])
            self.turn("client")

    def turn(self, who: str) -> None:
        if who == "relay":
            self.relay.server._turn()
        else:
            self.client.lane._turn(self.client.monitor)

    def store(self, index: str) -> None:
        """A read from the store is over, however long it took."""
        relay = self.relay
        relay.reads.next = relay.reads.waiting.pop(int(index))
        relay.server._readers._run()

    def writes(self, index: str) -> None:
        """What a pull that was given up still brings."""
        hanging, relay = self.client.hung[int(index)]
        here, there = hanging.blocks.pop(0)
        if relay is self.relay:
            self.client.bytes[here] = relay.bytes.get(there)

    def own(self, index: str) -> None:
        """The own client reads what only it may."""
        self._own(int(index), only_leftovers=True)

    def over(self, index: str) -> None:
        """SGLang gets the memory."""
        self.client.loads[int(index)].close()

    def long(self) -> None:
        self.longs -= 1
        CLOCK.now_s += LONG_S

    # -- what can go wrong

    def early(self, index: str) -> None:
        """The own client is faster."""
        self._own(int(index), only_leftovers=False)

    def overdue(self, index: str) -> None:
        """What was claimed takes too long for the load."""
        self.client.loads[int(index)].take_back_overdue(CLOCK.now_s + 1)

    def urge(self, index: str) -> None:
        self.client.lane.urge(self.client.loads[int(index)])

    def lose(self, who: str) -> None:
        self.links()[who].popleft()

    def again(self, who: str) -> None:
        link = self.links()[who]
        link.append(link[0])

    def late(self, who: str) -> None:
        link = self.links()[who]
        link.append(link.popleft())

    def cut(self) -> None:
        """The connection breaks, with all that is under way, and is there again."""
        for link in self.links().values():
            link.clear()
        self.client.monitor.events.extend([zmq.EVENT_DISCONNECTED, zmq.EVENT_HANDSHAKE_SUCCEEDED])
        self.relay.server._forget(b"client")  # as it notices when it sends

    def crash(self) -> None:
        """The relay dies and comes back at the same address."""
        self.cut()
        self.relay = Relay(self.relay.life + 1, self.plot.slots)

    def drain(self) -> None:
        self.relay.server.stop()
        self.relay.server._may_end()

    def missing(self) -> None:
        self.relay.missing = True

    def fail(self) -> None:
        self.outcome = "fail"
        self.turn("client")

    def hang(self) -> None:
        self.outcome = "hang"
        self.turn("client")

    def _own(self, index: int, only_leftovers: bool) -> None:
        load = self.client.loads[index]
        indices = load.claim_own(Limits(1, SLOT_BYTES, 2), only_leftovers)
        for each in indices:
            self.client.bytes[load.destinations[each].addresses[0]] = load.keys[each]
        if indices:
            load.land_own(indices, [load.sizes[each] for each in indices])

    # -- what must hold

    def check(self) -> None:
        for load in self.client.loads:
            for key, place, size, result in zip(
                load.keys, load.destinations, load.sizes, load.results, strict=True
            ):
                if result == size:
                    there = self.client.bytes.get(place.addresses[0])
                    assert there == key, f"{there} landed for {key}"

    def at_rest(self) -> bool:
        relay, lane = self.relay.server, self.client.lane
        return not (
            any(self.links().values())
            or any(load._undone for load in self.client.loads)
            or len(relay._queue)
            or len(relay._fetches)
            or len(relay._leases)
            or lane._owed
            or lane._bounce.kept_back
        )

    def settle(self) -> None:
        self.outcome, self.relay.missing = "", False
        for step in range(SETTLING_STEPS):
            if self.at_rest():
                break
            for who, link in self.links().items():
                while link:
                    self.hears(who)
            while self.relay.reads.waiting:
                self.store("0")
            for hanging, _ in self.client.hung:
                hanging.blocks.clear()
            for index, load in enumerate(self.client.loads):
                if load._undone and step > SETTLING_STEPS // 2:
                    self._own(index, only_leftovers=False)
            self.turn("relay")
            self.turn("client")
            if step % 4 == 3:
                CLOCK.now_s += 1.0
        self.check()
        relay, client, lane = self.relay.server, self.client, self.client.lane
        assert not any(load._undone for load in client.loads), "a load does not end"
        assert not len(relay._queue) and not len(relay._fetches), "a fetch does not end"
        assert not len(relay._leases), "a lease does not end"
        assert self.relay.ring.free_bytes == self.plot.slots, "memory of the ring is lost"
        assert not any(each.leases for each in relay._clients.values()), "a number stays taken"
        assert not lane._owed, "the lane waits for ever"
        assert client.bounce._slots.free_count == client.bounce._slots.count, "bounce memory is lost"
