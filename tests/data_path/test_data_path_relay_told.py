"""A prefill engine that loads by plans lets relays help that the scheduler tells it of."""

from __future__ import annotations

import ctypes
import itertools
import time

import torch
from tree_story import WAIT_S, Engine, prompt

from dualpath_sgl.lanes.forward import Forwarder
from dualpath_sgl.relay.memory import Memory
from dualpath_sgl.relay.resident.index import Index
from dualpath_sgl.relay.resident.lives import Lives
from dualpath_sgl.relay.resident.server import ResidentServer
from scheduler_svc.wire.protocol import Helper, Helpers

OPTIONS = {"relay": {"least_call_bytes": 0, "batch_bytes": 64 * 1024, "bounce_bytes": 8 * 2**20}}
PAGES, LONG_PAGE = 48, 64
"""Of a prompt of several batches."""


class Relay:
    """Speaks a relay's protocol, with what it shall have in memory at once: no store is slower than another."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        sizes = [len(value) for value in objects.values()]
        self._memory = Memory(sum(sizes))
        addresses = list(itertools.accumulate(sizes, initial=self._memory.address))[:-1]
        for address, value in zip(addresses, objects.values(), strict=True):
            ctypes.memmove(address, value, len(value))
        self._transfers = Forwarder("127.0.0.1", "tcp", "", [])
        self._transfers.register(self._memory.address, self._memory.byte_count)
        index = Index()
        index.note(list(objects), addresses, sizes, Lives(1, 1).now(torch.tensor([0])))
        self.server = ResidentServer(
            "127.0.0.1", 0, index, self._transfers.mooncake_address, self._memory.address
        )
        self.server.start()


def relay_comes_first(engine: Engine) -> None:
    """The own client reads nothing before the relay has brought something."""
    counts = engine.controller.storage_backend.loader.counts

    def wait(_keys) -> None:
        until_s = time.monotonic() + WAIT_S
        while not counts.relay_bytes and time.monotonic() < until_s:
            time.sleep(0.001)

    engine.store.before_read = wait


def test_a_relay_that_the_scheduler_tells_of_helps(engine):
    engine = engine("prefill", extra_config=OPTIONS, page_tokens=LONG_PAGE)
    assert engine.channel.described.helped and engine.channel.described.objects is None
    tokens = prompt(PAGES, LONG_PAGE)
    engine.store_holds(tokens)
    relay = Relay(engine.store.objects)
    loader = engine.controller.storage_backend.loader
    engine.channel.tell(Helpers((Helper("relay-0", relay.server.endpoint),)))
    engine.until(loader.lanes_up, "the relay may be asked")
    relay_comes_first(engine)
    req = engine.arrives(tokens)
    engine.until(lambda: engine.reports(req), "report")
    engine.channel.bring_none(req.bootstrap_room)
    engine.until(lambda: engine.admitted(req), "loaded")
    assert engine.in_tree(tokens) == [True] * PAGES
    assert loader.counts.relay_bytes > 0
    engine.channel.tell(Helpers())
    engine.until(lambda: not loader.lanes_up(), "it may not be asked any more")
    engine.finishes(req)
    engine.becomes_idle()


def test_without_a_relay_no_memory_is_taken_for_one(engine):
    engine = engine("prefill", extra_config=OPTIONS)
    backend = engine.controller.storage_backend
    tokens = prompt()
    engine.store_holds(tokens)
    req = engine.arrives(tokens)
    engine.until(lambda: engine.reports(req), "report")
    engine.channel.bring_none(req.bootstrap_room)
    engine.until(lambda: engine.admitted(req), "loaded")
    assert engine.in_tree(tokens) == [True] * 8
    assert backend.loader.counts.direct_calls == 0 and backend.loader._bounce._memory is None


def test_relays_of_flags_are_all_that_such_an_engine_has(engine):
    named = {"relays": ["relay-1=tcp://127.0.0.1:1"], **OPTIONS["relay"]}
    engine = engine("prefill", extra_config={"relay": named})
    assert not engine.channel.described.helped
    engine.channel.tell(Helpers((Helper("relay-0", "tcp://127.0.0.1:2"),)))
    backend = engine.controller.storage_backend
    assert [helper.name for helper in backend.relays.helpers] == ["relay-1"]


def test_a_decode_engine_that_loads_by_plans_wants_no_help(engine):
    described = engine("decode", extra_config=OPTIONS).channel.described
    assert not described.helped
    assert described.objects is None and described.fetch_endpoint is None
