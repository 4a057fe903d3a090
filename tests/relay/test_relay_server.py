"""The relay's loop, spoken to directly: a store of the test's own, and clients that say what they like."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import zmq
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from dualpath_sgl.evals.relay.world import eventually
from dualpath_sgl.relay import wire
from dualpath_sgl.relay.metrics import Metrics
from dualpath_sgl.relay.ring import Ring
from dualpath_sgl.relay.server import Server
from dualpath_sgl.relay.settings import Settings
from dualpath_sgl.relay.wire import (
    Alive,
    Fetch,
    Hello,
    Leaving,
    Ready,
    Reason,
    Refused,
    Rejected,
    Release,
    Released,
    Revoke,
    Welcome,
    decode_to_client,
)
from scheduler_svc.wire.protocol import Wire, encode

KIB, MIB = 2**10, 2**20
BASE = 1 << 30
PREFILL = Hello(engine="p")
PARENT = "00-" + "1" * 32 + "-" + "2" * 16 + "-01"


class FakeStore:
    """Objects have any size; reads wait while it is held up."""

    def __init__(self) -> None:
        self.reads: list[list[str]] = []
        self.lost: set[str] = set()
        self.may_return = threading.Event()
        self.may_return.set()

    def read(self, keys: list[str], addresses: list[int], sizes: list[int]) -> list[int]:
        self.reads.append(keys)
        self.may_return.wait()
        return [-704 if key in self.lost else size for key, size in zip(keys, sizes, strict=True)]

    @property
    def keys(self) -> list[str]:
        return [key for keys in self.reads for key in keys]


class Client:
    def __init__(self, endpoint: str, hello: Hello | None = PREFILL) -> None:
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(endpoint)
        self._leases = 0
        if hello is not None:
            self.say(hello)
            self.welcome = self.hears(Welcome)

    def say(self, message: Wire) -> None:
        self.socket.send(encode(message))

    def fetch(self, *keys: str, size: int = KIB, left: int = 0, lease: int | None = None) -> int:
        self._leases += 1
        lease = lease or self._leases
        self.say(
            Fetch(lease=lease, keys=keys, sizes=(size,) * len(keys), left_bytes=left, traceparent=PARENT)
        )
        return lease

    def hears(self, kind: type[Wire], within_s: float = 10.0):
        """The next message but Alive, which must be of that kind."""
        until_s = time.monotonic() + within_s
        while self.socket.poll(max(0, int(1000 * (until_s - time.monotonic())))):
            message = decode_to_client(self.socket.recv())
            if kind is Alive or not isinstance(message, Alive):
                assert isinstance(message, kind), message
                return message
        raise AssertionError(f"no {kind.__name__}")

    def hears_nothing(self, for_s: float = 0.3) -> None:
        until_s = time.monotonic() + for_s
        while self.socket.poll(max(0, int(1000 * (until_s - time.monotonic())))):
            message = decode_to_client(self.socket.recv())
            assert isinstance(message, Alive), message

    def refused(self) -> Reason:
        return self.hears(Refused).reason

    def release(self, lease: int) -> bool:
        self.say(Release(lease))
        return self.hears(Released).valid

    def leave(self) -> None:
        self.socket.close()


class RunningServer:
    def __init__(self, **settings: object) -> None:
        self.store = FakeStore()
        self.metrics = Metrics()
        self.spans = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.spans))
        self.settings = Settings(**{"ring_bytes": 4 * MIB, "slot_bytes": MIB, "readers": 1, **settings})
        self.ring = Ring(BASE, self.settings.ring_bytes, self.settings.slot_bytes, self.settings.keep_s)
        self.server = Server(
            self.settings, self.store, "there", self.ring, self.metrics, provider.get_tracer("test")
        )
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        self.clients: list[Client] = []

    def client(self, hello: Hello | None = PREFILL) -> Client:
        client = Client(self.server.endpoint, hello)
        self.clients.append(client)
        return client

    def counted(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    def is_idle(self) -> None:
        """Nothing is left of anybody's."""
        eventually(
            lambda: (
                self.ring.free_bytes == self.settings.ring_bytes
                and not len(self.server._queue)
                and not len(self.server._fetches)
                and not len(self.server._leases)
            ),
            "the relay is idle",
        )

    def end(self) -> None:
        self.store.may_return.set()
        for client in self.clients:
            client.leave()
        self.server._settings = self.settings.model_copy(update={"drain_s": 0.0})
        self.server.stop()
        self.thread.join(10)
        assert not self.thread.is_alive()


@pytest.fixture
def start() -> Iterator:
    running: list[RunningServer] = []

    def start(**settings: object) -> RunningServer:
        running.append(RunningServer(**settings))
        return running[-1]

    yield start
    for server in running:
        server.end()


def test_a_fetch_is_read_leased_and_released(start):
    relay = start()
    client = relay.client()
    lease = client.fetch("a", "b", size=100)
    ready = client.hears(Ready)
    assert ready == Ready(lease=lease, mooncake_address="there", addresses=(BASE, BASE + 100), got=(100, 100))
    assert client.release(lease)
    relay.is_idle()
    assert relay.counted("dualpath_relay_read_bytes_total") == 200
    assert relay.counted("dualpath_relay_objects_total", result="whole") == 2
    assert relay.counted("dualpath_relay_leases_total", end="released") == 1


def test_a_lease_is_released_once(start):
    relay = start()
    client = relay.client()
    lease = client.fetch("a")
    client.hears(Ready)
    assert client.release(lease)
    assert not client.release(lease)
    assert not client.release(77)


def test_a_lease_of_another_client_cannot_be_released(start):
    relay = start()
    client, other = relay.client(), relay.client()
    lease = client.fetch("a")
    client.hears(Ready)
    assert not other.release(lease)
    assert client.release(lease)


def test_a_lease_ends_by_itself_and_its_memory_goes_to_others(start):
    relay = start(lease_s=0.2, ring_bytes=2 * MIB, keep_s=0)
    client = relay.client()
    leases = [client.fetch("a", size=MIB), client.fetch("b", size=MIB)]
    assert {client.hears(Ready).lease for _ in leases} == set(leases)
    client.fetch("c", size=MIB)
    assert client.hears(Ready).addresses[0] in (BASE, BASE + MIB)
    assert not client.release(leases[0])
    relay.is_idle()
    assert relay.counted("dualpath_relay_leases_total", end="expired") >= 2


def test_an_object_that_is_not_there_has_its_code(start):
    relay = start()
    relay.store.lost = {"b"}
    client = relay.client()
    client.fetch("a", "b")
    assert client.hears(Ready).got == (KIB, -704)
    assert relay.counted("dualpath_relay_objects_total", result="missing") == 1
    # It is not kept: the store may have it the next time.
    relay.store.lost = set()
    client.fetch("b")
    assert client.hears(Ready).got == (KIB,)


def test_what_was_just_read_is_not_read_again(start):
    relay = start()
    first, second = relay.client(), relay.client(Hello(engine="p", rank=1))
    first.fetch("a", "b", "c")
    addresses = first.hears(Ready).addresses
    second.fetch("b", "x", "c")
    ready = second.hears(Ready)
    assert (ready.addresses[0], ready.addresses[2]) == addresses[1:]
    assert relay.store.keys == ["a", "b", "c", "x"]
    assert relay.counted("dualpath_relay_kept_bytes_total") == 2 * KIB


def test_what_is_being_read_is_not_read_again(start):
    relay = start()
    relay.store.may_return.clear()
    first, second = relay.client(), relay.client(Hello(engine="p", rank=1))
    first.fetch("a", "b")
    eventually(lambda: relay.store.reads, "the first one is read")
    second.fetch("b", "a")
    second.hears_nothing()
    relay.store.may_return.set()
    there = first.hears(Ready).addresses
    assert second.hears(Ready).addresses == there[::-1]
    assert relay.store.keys == ["a", "b"]
    # The first one's release leaves it to the second one.
    assert first.release(1)
    assert relay.ring.free_bytes < relay.settings.ring_bytes
    assert second.release(1)
    relay.is_idle()


def test_who_has_not_said_hello_gets_nothing(start):
    relay = start()
    stranger = relay.client(hello=None)
    stranger.fetch("a")
    assert stranger.refused() is Reason.UNKNOWN
    assert relay.store.reads == []


@pytest.mark.parametrize(("newest", "oldest"), [(wire.OLDEST_VERSION - 1 or 1, 1), (9, 9), (9, wire.VERSION)])
def test_versions_meet_or_are_rejected(start, newest, oldest):
    relay = start()
    client = relay.client(hello=None)
    client.say(Hello(engine="p", version=newest, oldest_version=oldest))
    if oldest <= wire.VERSION:
        assert client.hears(Welcome).version == min(newest, wire.VERSION)
    else:
        assert "relay protocol 9 to 9" in client.hears(Rejected).reason


def test_more_than_the_relay_takes_is_refused(start):
    relay = start(ring_bytes=8 * MIB)
    client = relay.client()
    assert client.welcome.most_bytes == 2 * MIB
    client.fetch("a", size=client.welcome.most_bytes + 1)
    assert client.refused() is Reason.TOO_LARGE
    relay.store.may_return.clear()
    for number in range(client.welcome.most_fetches):
        client.fetch(f"k{number}")
    client.fetch("one more")
    assert client.refused() is Reason.BUSY
    client.fetch("a", lease=2)
    assert client.refused() is Reason.IN_USE
    relay.store.may_return.set()
    ready = [client.hears(Ready).lease for _ in range(client.welcome.most_fetches)]
    assert [client.release(lease) for lease in ready] == [True] * len(ready)
    relay.is_idle()


def test_a_full_ring_makes_others_wait_until_something_is_released(start):
    relay = start(ring_bytes=2 * MIB, keep_s=60)
    holder, waiting = relay.client(), relay.client(Hello(engine="other"))
    held = [holder.fetch(name, size=MIB) for name in "ab"]
    for _ in held:
        holder.hears(Ready)
    waiting.fetch("c", size=MIB)
    waiting.hears(Alive)
    waiting.hears_nothing()
    assert holder.release(held[1])
    assert waiting.hears(Ready).addresses == (BASE + MIB,)
    assert relay.store.keys == ["a", "b", "c"]


def test_a_fetch_that_has_not_begun_can_be_revoked(start):
    relay = start()
    relay.store.may_return.clear()
    client = relay.client()
    begun, queued = client.fetch("a"), client.fetch("b")
    eventually(lambda: relay.store.reads, "the first one is read")
    client.say(Revoke(queued))
    client.say(Revoke(begun))
    assert client.hears(Refused) == Refused(queued, Reason.REVOKED)
    client.hears_nothing()
    relay.store.may_return.set()
    assert client.hears(Ready).lease == begun
    assert relay.store.keys == ["a"]


def test_a_fetch_that_is_given_up_takes_nothing_with_it(start):
    relay = start()
    relay.store.may_return.clear()
    client = relay.client()
    leases = [client.fetch("a"), client.fetch("b")]
    eventually(lambda: relay.store.reads, "the first one is read")
    assert [client.release(lease) for lease in leases] == [False, False]
    relay.store.may_return.set()
    client.hears_nothing()
    relay.is_idle()
    assert relay.store.keys == ["a"]


def test_a_client_that_is_gone_leaves_nothing(start):
    relay = start(lease_s=600)
    relay.store.may_return.clear()
    client = relay.client()
    client.fetch("a")
    client.fetch("b")
    eventually(lambda: relay.store.reads, "the first one is read")
    client.leave()
    relay.store.may_return.set()
    relay.is_idle()


def test_a_client_that_is_gone_before_it_pulls_leaves_nothing(start):
    relay = start(lease_s=600)
    client = relay.client()
    client.fetch("a")
    client.hears(Ready)
    client.leave()
    relay.is_idle()


def test_a_store_that_hangs_is_refused_and_its_memory_waits_for_it(start):
    relay = start(hang_s=0.1, readers=1)
    relay.store.may_return.clear()
    client = relay.client()
    client.fetch("a")
    assert client.refused() is Reason.STORE_HANGS
    assert relay.ring.free_bytes == relay.settings.ring_bytes - MIB
    eventually(lambda: relay.counted("dualpath_relay_reads_hanging") == 1, "it is counted")
    # Others are read meanwhile, and that one again when it is asked for again.
    relay.store.may_return.set()
    client.fetch("a")
    assert client.hears(Ready).got == (KIB,)
    client.release(2)
    relay.is_idle()


def test_the_relay_stops_asking_a_store_that_hangs_for_good(start, monkeypatch):
    monkeypatch.setattr("dualpath_sgl.relay.readers.MOST_HANGING", 2)
    relay = start(hang_s=0.1, readers=1)
    relay.store.may_return.clear()
    client = relay.client()
    for name in "ab":
        client.fetch(name)
        assert client.refused() is Reason.STORE_HANGS
    client.fetch("c")
    assert client.refused() is Reason.STORE_HANGS
    assert relay.store.keys == ["a", "b"]
    relay.store.may_return.set()
    eventually(lambda: not relay.counted("dualpath_relay_reads_hanging"), "the store has answered")
    client.fetch("c")
    assert client.hears(Ready).got == (KIB,)


def test_two_who_wait_for_one_read_that_hangs_are_both_refused(start):
    relay = start(hang_s=0.1, readers=2)
    relay.store.may_return.clear()
    clients = [relay.client(), relay.client(Hello(engine="p", rank=1))]
    for client in clients:
        client.fetch("a")
    assert [client.refused() for client in clients] == [Reason.STORE_HANGS] * 2
    relay.store.may_return.set()
    relay.is_idle()


def test_malformed_messages_are_ignored_and_counted(start):
    relay = start()
    client = relay.client()
    for frame in (b"", b"{", b'{"type":"fetch"}', b"[" * 1000, b"\xff" * 100):
        client.socket.send(frame)
    client.socket.send_multipart([b'{"type":"hello",', b'"engine":"p"}'])  # one message in two frames
    client.hears(Welcome)
    client.fetch("a")
    client.hears(Ready)
    assert relay.counted("dualpath_relay_malformed_total") == 5


def test_an_oversized_message_ends_its_connection_alone(start):
    relay = start()
    client, greedy = relay.client(), relay.client()
    greedy.socket.send(b" " * (4 * wire.MAX_MESSAGE_BYTES))
    client.fetch("a")
    client.hears(Ready)
    greedy.hears_nothing(0.1)
    assert relay.store.keys == ["a"]


def test_draining_tells_clients_serves_what_was_asked_and_ends(start):
    relay = start(lease_s=60)
    relay.store.may_return.clear()
    client = relay.client()
    leases = [client.fetch("a"), client.fetch("b")]
    eventually(lambda: relay.store.reads and len(relay.server._queue), "one is read, one waits")
    relay.server.stop()
    client.hears(Leaving)
    client.fetch("c")
    assert client.refused() is Reason.LEAVING
    relay.store.may_return.set()
    assert [client.hears(Ready).lease for _ in leases] == leases
    assert relay.thread.is_alive()
    assert [client.release(lease) for lease in leases] == [True, True]
    relay.thread.join(10)
    assert not relay.thread.is_alive()


def test_draining_does_not_wait_for_ever(start):
    relay = start(lease_s=600, drain_s=0.2)
    client = relay.client()
    client.fetch("a")
    client.hears(Ready)
    relay.server.stop()
    relay.thread.join(10)
    assert not relay.thread.is_alive()


def test_a_fetch_is_a_span_of_its_loads_trace(start):
    relay = start()
    client = relay.client()
    client.fetch("a", "b")
    client.hears(Ready)
    (span,) = relay.spans.get_finished_spans()
    assert span.name == "store to relay"
    assert format(span.context.trace_id, "032x") == "1" * 32
    assert span.attributes["dualpath.bytes"] == 2 * KIB


def test_a_fault_in_one_message_is_counted_and_the_relay_goes_on(start):
    relay = start()
    client = relay.client()
    revoke, relay.server._revoke = relay.server._revoke, None
    client.say(Revoke(1))
    client.fetch("a")
    client.hears(Ready)
    assert relay.counted("dualpath_relay_faults_total", step="handling a message") == 1
    relay.server._revoke = revoke
    begin, relay.server._fetches.need_no_read = relay.server._fetches.need_no_read, None
    client.fetch("b")
    assert client.refused() is Reason.FAULT
    relay.server._fetches.need_no_read = begin
