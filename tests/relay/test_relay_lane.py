"""A lane and a relay that says what no relay should: nothing of it is believed, and the load ends right."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

import pytest
import zmq
from relay_world import MIB

from dualpath_sgl.evals.relay.world import HOST
from dualpath_sgl.lanes.forward import Forwarder
from dualpath_sgl.relay import wire
from dualpath_sgl.relay.client.relays import Helper
from dualpath_sgl.relay.memory import Memory
from dualpath_sgl.relay.wire import (
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
    decode_to_relay,
)
from scheduler_svc.wire.protocol import Wire, encode

SIZES = [MIB] * 12
_transfers: list[Forwarder] = []


class StrangeRelay(threading.Thread):
    """Its memory can be read, and holds nobody's objects."""

    def __init__(
        self,
        answer: Callable[[StrangeRelay, Fetch | Release], list[Wire | bytes]],
        *first_welcomes: Welcome,
    ) -> None:
        super().__init__(daemon=True)
        self._first_welcomes = first_welcomes
        self.memory = Memory(4 * MIB)
        self.transfers = Forwarder(HOST, "tcp", "", [])
        self.transfers.register(self.memory.address, self.memory.byte_count)
        _transfers.append(self.transfers)  # Mooncake's destructor takes a second
        self.asked = 0
        self._answer = answer
        self._socket = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        port = self._socket.bind_to_random_port(f"tcp://{HOST}")
        self.helper = Helper("strange", f"tcp://{HOST}:{port}")
        self.name = "strange"
        self.ends = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.ends.is_set():
            if not self._socket.poll(50):
                continue
            identity, frame = self._socket.recv_multipart()
            message = decode_to_relay(frame)
            for answer in self._answers(message):
                frame = answer if isinstance(answer, bytes) else encode(answer)
                self._socket.send_multipart([identity, frame])
        self._socket.close()

    def _answers(self, message: wire.ToRelay) -> list[Wire | bytes]:
        match message:
            case Hello():
                return [*self._first_welcomes, self.welcome()]
            case Fetch():
                self.asked += 1
                return self._answer(self, message)
            case Release():
                return self._answer(self, message)
            case Revoke():
                return []

    def welcome(self) -> Welcome:
        return Welcome(
            version=1,
            mooncake_address=self.transfers.mooncake_address,
            address=self.memory.address,
            lease_s=5.0,
            most_bytes=4 * MIB,
            most_fetches=4,
            ahead=2,
        )

    def ready(self, fetch: Fetch, **changed: object) -> Ready:
        fields = {
            "lease": fetch.lease,
            "mooncake_address": self.transfers.mooncake_address,
            "addresses": (self.memory.address,) * len(fetch.keys),
            "got": fetch.sizes,
        }
        return Ready(**{**fields, **changed})


def _each(fetched: Callable[[StrangeRelay, Fetch], list[Wire | bytes]], valid: bool = False):
    """Fetches are answered so, and every release with `valid`."""

    def answer(relay: StrangeRelay, message: Fetch | Release) -> list[Wire | bytes]:
        return fetched(relay, message) if isinstance(message, Fetch) else [Released(message.lease, valid)]

    return answer


SAYINGS = {
    "nonsense": _each(lambda relay, fetch: [b"{", b"", b'{"type":"ready"}']),
    "too few objects": _each(lambda relay, fetch: [relay.ready(fetch, addresses=(1,), got=(1,))], True),
    "a lease of nobody's": _each(lambda relay, fetch: [relay.ready(fetch, lease=2**60)], True),
    "released unasked": _each(
        lambda relay, fetch: [Released(fetch.lease, True), Released(2**60, True)], True
    ),
    "memory that is not its own": _each(
        lambda relay, fetch: [relay.ready(fetch, addresses=(4096,) * len(fetch.keys))], True
    ),
    "memory that was never met": _each(
        lambda relay, fetch: [relay.ready(fetch, mooncake_address=f"{HOST}:1")], True
    ),
    "shorter objects": _each(lambda relay, fetch: [relay.ready(fetch, got=(7,) * len(fetch.keys))], True),
    "longer objects": _each(
        lambda relay, fetch: [relay.ready(fetch, got=tuple(size + 1 for size in fetch.sizes))], True
    ),
    "objects that are not there": _each(
        lambda relay, fetch: [relay.ready(fetch, got=(-704,) * len(fetch.keys))], True
    ),
    "a lease that was over": _each(lambda relay, fetch: [relay.ready(fetch)], False),
    "who are you": _each(lambda relay, fetch: [Refused(fetch.lease, Reason.UNKNOWN)]),
    "no, for every reason": _each(lambda relay, fetch: [Refused(fetch.lease, reason) for reason in Reason]),
    "go away": _each(lambda relay, fetch: [Rejected("go away")]),
    "leaving": _each(lambda relay, fetch: [Leaving(), Refused(fetch.lease, Reason.LEAVING)]),
    "welcome again": _each(lambda relay, fetch: [relay.welcome(), Refused(fetch.lease, Reason.FAULT)]),
    "nothing": _each(lambda relay, fetch: []),
}


@pytest.mark.parametrize("saying", SAYINGS)
def test_what_no_relay_should_say(scene, saying):
    relay = StrangeRelay(SAYINGS[saying])
    try:
        prefill = scene.prefill(relay, silence_s=0.3)
        objects = scene.objects(SIZES)
        prefill.may_read.clear()  # until the relay was asked, or all would be read before
        threading.Timer(0.2, prefill.may_read.set).start()
        assert prefill.load(objects) == SIZES
        assert objects.wrong() == []
        assert relay.asked > 0
        assert prefill.counts.relay_bytes == 0 and prefill.counts.own_bytes == objects.byte_count
    finally:
        relay.ends.set()
        relay.join()


def test_a_relay_is_met_while_the_memory_that_it_had_does_not_answer(scene):
    before = scene.relay()
    welcome = scene.prefill(before).lane(before)._standing.welcome
    before.send(signal.SIGSTOP)
    relay = StrangeRelay(_each(lambda relay, fetch: []), welcome)
    try:
        prefill = scene.prefill(relay)
        assert [thread.name for thread in threading.enumerate() if "greeting" in thread.name]
        assert prefill.transport(relay) is not None
    finally:
        relay.ends.set()
        relay.join()
        before.send(signal.SIGCONT)
