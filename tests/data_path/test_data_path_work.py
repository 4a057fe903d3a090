"""What an engine says it has to do: every request from its arrival to its end, each once.

Requests, queues and batches are SGLang's classes.  Queues are filled by hand (`queue_of`): their
constructors want a model and a transfer engine.  The end-to-end tests pass requests through real ones.
"""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import pytest
from data_path_world import rooms
from engine_parts import EngineParts
from sglang.srt.disaggregation.decode import DecodePreallocQueue, DecodeRequest, DecodeTransferQueue
from sglang.srt.disaggregation.prefill import PrefillBootstrapQueue
from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req, ScheduleBatch
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestOutcome
from sglang.srt.sampling.sampling_params import SamplingParams

from dualpath_sgl import decode, hooks, runtime
from dualpath_sgl.control import decode_work
from scheduler_svc.wire.protocol import Role


def request(tokens: int = 10, host: str = "127.0.0.1") -> Req:
    room = next(rooms)
    return Req(
        f"request-{room}",
        "",
        array("q", [0]) * tokens,
        SamplingParams(max_new_tokens=4),
        bootstrap_host=host,
        bootstrap_room=room,
    )


def queue_of(scheduler: SimpleNamespace) -> DecodePreallocQueue:
    queue = DecodePreallocQueue.__new__(DecodePreallocQueue)
    queue.queue, queue.retracted_queue, queue.held_rebootstrap_reqs = [], [], []
    queue.transfer_queue = DecodeTransferQueue.__new__(DecodeTransferQueue)
    queue.transfer_queue.queue = []
    queue.tree_cache, queue.scheduler = None, scheduler
    return queue


class DecodeEngine:
    """A DE without a plan for anything: its scheduler is away, so requests are admitted at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(decode_work, "COUNT_INTERVAL_S", 0.0)
        monkeypatch.setattr(decode, "held_on_host", lambda tree, req: SimpleNamespace(tokens=0))
        self.parts = EngineParts(Role.DECODE, connected=False)
        self.side = self.parts.side
        monkeypatch.setattr(runtime, "_current", self.parts.as_runtime)
        self.scheduler = SimpleNamespace(
            waiting_queue=[], running_batch=ScheduleBatch(reqs=[], batch_is_full=False)
        )
        self.queue = queue_of(self.scheduler)
        hooks.before_pop_preallocated(self.queue)

    def arrive(self, req: Req) -> DecodeRequest:
        decode_req = DecodeRequest(req, kv_receiver=None)
        self.queue.queue.append(decode_req)
        hooks.after_prealloc_add(None, self.queue, req)
        return decode_req

    def step(self) -> None:
        """What DualPath does in one iteration of SGLang's loop."""
        allocator = SimpleNamespace(available_size=lambda: 1000)
        tree = SimpleNamespace(token_to_kv_pool_allocator=allocator, evictable_size=lambda: 0)
        hooks.after_check_hicache_events(None, tree)
        self.side.tick(self.queue)

    @property
    def load(self) -> tuple[int, int]:
        load = self.parts.workload.now()
        return load.sequences, load.tokens


@pytest.fixture
def engine(monkeypatch) -> DecodeEngine:
    return DecodeEngine(monkeypatch)


def test_a_request_counts_once_from_its_arrival_at_a_decode_engine_to_its_last_token(engine):
    scheduler = engine.scheduler
    assert engine.load == (0, 0)
    decode_req = engine.arrive(request(tokens=100))
    req = decode_req.req
    assert engine.load == (1, 100), "a heartbeat after its report must count it"
    engine.step()
    assert engine.load == (1, 100), "queued, and settled"

    def moves_to(there: list, here: list, what) -> None:
        here.clear()
        there.append(what)
        assert engine.load == (1, 100), "before the next iteration"
        engine.step()
        assert engine.load == (1, 100), "after it"

    moves_to(engine.queue.transfer_queue.queue, engine.queue.queue, decode_req)
    moves_to(scheduler.waiting_queue, engine.queue.transfer_queue.queue, req)
    moves_to(scheduler.running_batch.reqs, scheduler.waiting_queue, req)
    moves_to(engine.queue.retracted_queue, scheduler.running_batch.reqs, req)
    moves_to(engine.queue.held_rebootstrap_reqs, engine.queue.retracted_queue, req)
    moves_to(scheduler.running_batch.reqs, engine.queue.held_rebootstrap_reqs, req)
    req.finished_reason = FINISH_LENGTH(4)
    engine.step()
    assert engine.load == (0, 0), "finished, and still in its batch"
    assert engine.parts.channel.departures == 1


def test_a_request_that_is_admitted_between_two_counts_is_never_missing(engine, monkeypatch):
    engine.step()
    monkeypatch.setattr(engine.side.work, "_next_count_s", float("inf"))
    decode_req = engine.arrive(request(tokens=100))
    engine.step()
    engine.queue.queue.clear()
    engine.queue.transfer_queue.queue.append(decode_req)
    engine.step()
    assert engine.load == (1, 100)


def test_a_request_that_vanishes_from_every_queue_stops_counting(engine):
    engine.arrive(request())
    engine.step()
    engine.queue.queue.clear()  # aborted after it was settled
    engine.step()
    engine.step()
    assert engine.load == (0, 0)


def test_only_requests_that_wait_for_device_memory_are_taken_off_what_is_free(engine):
    engine.scheduler.running_batch.reqs.append(request(tokens=300))
    engine.arrive(request(tokens=100))
    engine.step()
    assert engine.load == (2, 400)
    assert engine.parts.workload.now().device_free_tokens == 1000 - 100


def test_health_checks_are_no_work(engine):
    engine.arrive(request(host=FAKE_BOOTSTRAP_HOST))
    engine.scheduler.running_batch.reqs.append(request(host=FAKE_BOOTSTRAP_HOST))
    engine.step()
    assert engine.load == (0, 0)


def test_a_decode_engines_queues_are_looked_through_when_they_change_or_a_count_is_due(engine, monkeypatch):
    monkeypatch.setattr(decode_work, "COUNT_INTERVAL_S", 3600.0)
    batch = engine.scheduler.running_batch.reqs
    batch.append(request(tokens=100))
    engine.step()
    assert engine.load == (1, 100)
    batch[0].finished_reason = FINISH_LENGTH(4)
    engine.step()
    assert engine.load == (1, 100), "it is still in its batch, and nothing else has changed"
    batch.clear()
    engine.step()
    assert engine.load == (0, 0) and engine.parts.channel.departures == 1


# Prefill


class Tree:
    """Of SGLang's tree only what ends a request."""

    def finish(self, handle, outcome: CacheRequestOutcome) -> None:
        assert outcome is CacheRequestOutcome.ABORT
        hooks.after_finish(None, self, handle, outcome)


@pytest.fixture
def prefill(monkeypatch) -> EngineParts:
    parts = EngineParts(Role.PREFILL)
    monkeypatch.setattr(runtime, "_current", parts.as_runtime)
    return parts


def test_a_request_counts_on_a_prefill_engine_until_sglang_has_finished_with_it(prefill):
    load = prefill.workload.now
    requests = [request(tokens=100), request(tokens=50)]
    for req in requests:
        prefill.side.begin(req)
    prefill.side.begin(requests[0])  # SGLang looks for its stored prefix once more
    assert (load().sequences, load().tokens) == (2, 150)
    prefill.side.forget(requests[0].rid)
    assert (load().sequences, load().tokens) == (1, 50)


def test_a_prompt_that_the_prefill_engine_refuses_as_too_long_stops_counting(prefill):
    queue = PrefillBootstrapQueue.__new__(PrefillBootstrapQueue)
    queue.max_input_len, queue.queue = 99, []
    queue.scheduler = SimpleNamespace(
        tree_cache=Tree(), output_streamer=SimpleNamespace(stream_output=lambda reqs, logprob: None)
    )
    req = request(tokens=100)
    prefill.side.begin(req)
    queue.add(req, 1)
    assert req.finished() and not queue.queue
    hooks.after_bootstrap_add(None, queue, req, 1)
    assert prefill.side.held == 0
