"""Loads through real relays: who brings what, and that the bytes are right."""

from __future__ import annotations

import ctypes
import signal
import time

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from relay_world import MIB, PROMPT, SLOW, Loading

from dualpath_sgl.evals.relay.world import eventually
from dualpath_sgl.relay.client import loader
from dualpath_sgl.relay.client.prefetch.call import Call, making

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_relays_bring_all_but_what_the_own_client_has_claimed(scene):
    relays = scene.relay(), scene.relay()
    objects = scene.objects()
    prefill = scene.prefill(*relays)
    prefill.may_read.clear()
    loading = Loading(lambda: prefill.load(objects))
    eventually(lambda: prefill.counts.relay_bytes + 8 * MIB > objects.byte_count, "relays bring the rest")
    prefill.may_read.set()
    assert loading.ends() == objects.sizes
    assert objects.wrong() == []


def test_every_link_takes_part_and_no_object_is_read_twice(scene):
    relays = scene.relay(rate=SLOW), scene.relay(rate=SLOW)
    objects = scene.objects()
    prefill = scene.prefill(*relays, rate=SLOW)
    assert prefill.load(objects) == objects.sizes
    assert objects.wrong() == []
    read = [[key for key, _ in relay.reads()] for relay in relays]
    assert all(read) and prefill.own_keys
    assert sorted([*read[0], *read[1], *prefill.own_keys]) == sorted(objects.keys)
    assert prefill.counts.own_bytes + prefill.counts.relay_bytes == objects.byte_count


def test_a_small_call_asks_no_relay(scene):
    relay = scene.relay()
    objects = scene.objects([512 * 1024, 256 * 1024])
    prefill = scene.prefill(relay)
    assert prefill.load(objects) == objects.sizes
    assert objects.wrong() == [] and relay.reads() == []
    assert prefill.counts.direct_calls == 1


def test_memory_that_is_not_the_engines_host_memory_is_left_to_the_own_client(scene):
    relay = scene.relay()
    objects = scene.objects([4 * MIB] * 4)
    prefill = scene.prefill(relay)
    assert prefill.loader.load(objects.keys, objects.pointers, objects.sizes) == objects.sizes
    assert objects.wrong() == [] and relay.reads() == []


@pytest.fixture
def spans(scene):
    """Of every load, as an exporter gets them; the first argument is a prefill engine."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    def told(prefill, objects) -> dict[str, object]:
        prefill.loader._tracer = provider.get_tracer("test")
        exporter.clear()
        assert prefill.load(objects) == objects.sizes
        (span,) = exporter.get_finished_spans()
        helped = span.attributes["dualpath.relay.bytes"] > 0
        assert span.name == ("relay to prefill" if helped else "own read to prefill")
        assert span.attributes["dualpath.bytes"] == objects.byte_count
        assert span.attributes["dualpath.bandwidth_bytes_per_s"] > 0
        told.span = span
        return {key.removeprefix("dualpath."): value for key, value in span.attributes.items()}

    return told


def test_a_load_s_span_says_who_brought_what_and_stands_in_its_request_s_trace(scene, spans):
    relays = scene.relay(rate=SLOW), scene.relay(rate=SLOW)
    objects = scene.objects()
    prefill = scene.prefill(*relays, rate=SLOW)
    with making(Call("request-7", TRACEPARENT)):
        told = spans(prefill, objects)
    assert f"{spans.span.context.trace_id:032x}" in TRACEPARENT and told["rid"] == "request-7"
    counts = prefill.counts
    assert told["own.bytes"] == counts.own_bytes > 0
    assert told["relay.bytes"] == counts.relay_bytes > 0
    assert all(told[f"relay.bytes.{relay.name}"] == counts.relays[relay.name].bytes for relay in relays)
    assert "fallback.reason" not in told and "reason" not in told


def test_a_load_s_span_says_why_nobody_helped(scene, spans):
    relay = scene.relay()
    prefill = scene.prefill(relay)
    assert spans(prefill, scene.objects([64 * 1024]))["reason"] == "not worth asking relays"
    relay.send(signal.SIGKILL)
    eventually(lambda: not prefill.loader.lanes_up(), "it may not be asked any more")
    assert spans(prefill, scene.objects())["fallback.reason"] == "no relay answers"
    prefill.relays.replace([])
    assert spans(prefill, scene.objects())["reason"] == "no relay helps"


def test_a_load_that_is_given_up_ends_early(scene):
    relay = scene.relay(rate=SLOW)
    objects = scene.objects()
    prefill = scene.prefill(relay)
    prefill.may_read.clear()
    call = Call()

    def load() -> list[int]:
        with making(call):
            return prefill.load(objects)

    loading = Loading(load)
    eventually(lambda: prefill.counts.relays[relay.name].bytes, "the relay brings a part")
    call.given_up = True
    prefill.may_read.set()
    results = loading.ends()
    assert results.count(-1) > 0
    came = [index for index, got in enumerate(results) if got > 0]
    assert came and not set(came) & set(objects.wrong())
    objects.forget()
    time.sleep(0.3)
    assert len(objects.wrong()) == len(objects.sizes)  # nothing is written afterwards


def test_without_a_relay_the_own_client_does_everything(scene):
    objects = scene.objects()
    prefill = scene.prefill()
    assert prefill.load(objects) == objects.sizes
    assert objects.wrong() == [] and prefill.own_keys == objects.keys


def test_objects_of_every_size_come(scene):
    relay = scene.relay(ring_bytes=128 * MIB)
    sizes = [1, 64, 4096, 4097, 12 * MIB, 3 * MIB + 1, 7 * MIB, 20 * MIB, 5]
    objects = scene.objects(sizes)
    prefill = scene.prefill(relay, bounce_bytes=64 * MIB)
    prefill.may_read.clear()
    loading = Loading(lambda: prefill.load(objects))
    eventually(lambda: prefill.counts.relays[relay.name].objects >= 6, "the relay brings large ones, too")
    prefill.may_read.set()
    assert loading.ends() == sizes
    assert objects.wrong() == []
    largest = objects.keys[sizes.index(20 * MIB)]  # more than a quarter of the bounce memory
    assert largest in prefill.own_keys and largest not in dict(relay.reads())


def test_an_object_may_go_into_several_blocks(scene):
    relay = scene.relay()
    objects = scene.objects([MIB] * 16)
    prefill = scene.prefill(relay)
    prefill._destinations.add(objects.address, objects.byte_count)
    prefill.may_read.clear()
    # The halves of each object lie apart, as the layers of a page do.
    half = MIB // 2
    pointers = [[objects.address + i * half, objects.address + (16 + i) * half] for i in range(16)]
    loading = Loading(lambda: prefill.loader.load(objects.keys, pointers, [[half, half]] * 16))
    eventually(lambda: prefill.counts.relay_bytes >= 8 * MIB, "the relay brings its part")
    prefill.may_read.set()
    assert loading.ends() == [MIB] * 16
    together = [ctypes.string_at(first, half) + ctypes.string_at(second, half) for first, second in pointers]
    ctypes.memmove(objects.address, b"".join(together), 16 * MIB)
    assert objects.wrong() == []


def test_two_loads_at_a_time_are_both_right(scene):
    relays = scene.relay(rate=SLOW), scene.relay(rate=SLOW)
    first, second = scene.objects(), scene.objects()
    prefill = scene.prefill(*relays, rate=SLOW)
    loads = [Loading(lambda it=it: prefill.load(it)) for it in (first, second)]
    for load, objects in zip(loads, (first, second), strict=True):
        assert load.ends() == objects.sizes
        assert objects.wrong() == []


def test_relays_join_and_leave_while_loads_run(scene):
    old, new = scene.relay(rate=SLOW), scene.relay(rate=SLOW)
    objects = scene.objects(PROMPT * 2)
    prefill = scene.prefill(old, rate=SLOW)
    loading = Loading(lambda: prefill.load(objects))
    eventually(old.reads, "the first relay reads")
    prefill.relays.replace([new.helper])
    assert loading.ends() == objects.sizes
    assert objects.wrong() == []
    assert new.reads()
    assert [lane.helper.name for lane in prefill.loader.lanes_up()] == [new.name]


def test_an_object_that_the_store_has_lost_fails_alone(scene):
    relay = scene.relay()
    objects = scene.objects([MIB] * 16)
    lost = [0, 7, 15]
    for index in lost:
        scene.store.client.remove(objects.keys[index], True)
    prefill = scene.prefill(relay)
    results = prefill.load(objects)
    assert [index for index, got in enumerate(results) if got < 0] == lost
    assert set(objects.wrong()) == set(lost)
    assert {objects.keys[index] for index in lost} <= set(prefill.own_keys)  # theirs is the last word


@pytest.mark.parametrize("stored", [MIB // 2, 2 * MIB])
def test_an_object_of_another_size_is_no_object(scene, stored):
    relay = scene.relay()
    other = [3, 12]
    objects = scene.objects([MIB] * 16, stored=[stored if i in other else MIB for i in range(16)])
    prefill = scene.prefill(relay)
    results = prefill.load(objects)
    assert [index for index, got in enumerate(results) if got < 0] == other
    assert [index for index, got in enumerate(results) if got == MIB] == [
        i for i in range(16) if i not in other
    ]


def test_of_objects_that_ranks_share_the_own_client_reads_none(scene):
    relay = scene.relay(rate=SLOW)
    objects = scene.objects()
    states = set(objects.keys[-30:])  # each rank has its own
    prefill = scene.prefill(relay, rate=SLOW, silence_s=60, is_shared=lambda key: key not in states)
    assert prefill.load(objects) == objects.sizes
    assert objects.wrong() == []
    assert prefill.own_keys and set(prefill.own_keys) <= states


def test_ranks_that_share_their_kv_have_it_read_once(scene, monkeypatch):
    monkeypatch.setattr(loader, "OVERDUE_S", 60.0)  # nothing is read twice for want of patience
    relays = scene.relay(rate=SLOW), scene.relay(rate=SLOW)
    ranks = [scene.objects()]
    ranks += [scene.for_another_rank(ranks[0]) for _ in range(2)]
    prefills = [scene.prefill(*relays, is_shared=lambda key: True, silence_s=60) for _ in ranks]
    loads = [Loading(lambda pair=pair: pair[0].load(pair[1])) for pair in zip(prefills, ranks, strict=True)]
    for load, objects in zip(loads, ranks, strict=True):
        assert load.ends() == objects.sizes
        assert objects.wrong() == []
    read = [key for relay in relays for key, _ in relay.reads()]
    own = [key for prefill in prefills for key in prefill.own_keys]
    assert own == []
    assert set(read) == set(ranks[0].keys)
    # One read each; two relays may both have one that was taken over at the end.
    assert len(read) <= 1.2 * len(ranks[0].keys)
