"""What an engine in relay mode says it has to do, and which rooms it tells of.

Requests and queues are SGLang's classes, as in test_data_path_work; tree and scheduler are stand-ins that
say what SGLang's would.  The end-to-end test with relays passes requests through real ones.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sglang.srt.disaggregation.decode import DecodeRequest
from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, ScheduleBatch
from sglang.srt.runtime_context import get_parallel
from test_data_path_work import queue_of, request

from dualpath_sgl import relay_engine, relay_hooks
from dualpath_sgl.control import decode_work, prefill_work
from dualpath_sgl.control.decode_work import DecodeWork
from dualpath_sgl.control.prefill_work import PrefillWork
from dualpath_sgl.relay_engine import RelayEngine
from scheduler_svc.wire.protocol import Done, Mode, RankInfo, Report, Role

PAGE = 16
PAGE_BYTES = 1000


class Engine:
    """A rank in relay mode whose words to the scheduler are kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, role: Role, rank: int = 0) -> None:
        monkeypatch.setattr(prefill_work, "LOOK_S", 0.0)
        monkeypatch.setattr(decode_work, "COUNT_INTERVAL_S", 0.0)
        self.now_s = 100.0
        monkeypatch.setattr(prefill_work.time, "monotonic", lambda: self.now_s)
        self.said: list[Report | Done] = []
        self.loading: set[str] = set()
        self.tree = SimpleNamespace(
            has_ongoing_prefetch=lambda handle: handle.rid in self.loading,
            token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: 900),
            evictable_size=lambda: 100,
        )
        self.scheduler = SimpleNamespace(
            tree_cache=self.tree,
            waiting_queue=[],
            processed_tokens_counter=0,
            enable_overlap=False,
            running_batch=ScheduleBatch(reqs=[], batch_is_full=False),
        )
        self.engine = RelayEngine.__new__(RelayEngine)
        self.engine._scheduler = self.scheduler
        self.engine._info = RankInfo(
            engine_id="p0", role=role, rank=rank, tp_size=2, url="http://127.0.0.1:1", fingerprint="relay",
            page_size=PAGE, page_bytes=PAGE_BYTES, mode=Mode.RELAY,
        )  # fmt: skip
        self.departures = 0
        self.engine.control = SimpleNamespace(send=self.said.append)
        self.engine.prefill = PrefillWork(self.engine._arrived, self._left)
        self.engine.decode = DecodeWork(self._left)
        self.engine._free_tokens = self.engine._queued_tokens = 0
        monkeypatch.setattr(relay_engine, "_current", self.engine)

    def _left(self) -> None:
        self.departures += 1

    def arrive(self, tokens: int, local: int = 0, loads: bool = True):
        """SGLang's arrival path, of a request that the tree holds a part of."""
        req = request(tokens)
        relay_hooks.before_prefetch_kvcache(self.scheduler, req)
        req.storage_prefetch_last_match_len = local
        if loads:
            self.loading.add(req.rid)
        relay_hooks.after_prefetch_kvcache(None, self.scheduler, req)
        return req

    def finds(self, req, hit_tokens: int, least: int = 1) -> None:
        controller = SimpleNamespace(prefetch_threshold=least)
        operation = SimpleNamespace(request_id=req.rid)
        relay_hooks.after_sync_prefetch_hit_query(hit_tokens, controller, operation, hit_tokens)

    def step(self) -> None:
        relay_hooks.after_check_hicache_events(None, self.tree)

    @property
    def load(self):
        return self.engine.workload()

    def reports(self) -> list[tuple[int, int, int | None]]:
        """Prompt tokens, L_P, K; each is followed by its Done."""
        assert [type(one) for one in self.said] == [Report, Done] * (len(self.said) // 2)
        pairs = list(zip(self.said[::2], self.said[1::2], strict=True))
        assert all(report.room == done.room for report, done in pairs)
        return [(one.prompt_tokens, one.local_pages, one.hit_pages) for one, _ in pairs]


@pytest.fixture
def prefill(monkeypatch) -> Engine:
    return Engine(monkeypatch, Role.PREFILL)


def test_a_request_is_told_of_once_when_the_store_has_answered(prefill):
    req = prefill.arrive(10 * PAGE, local=2 * PAGE)
    prefill.step()
    assert prefill.reports() == [], "its stored prefix is not known"
    prefill.finds(req, 6 * PAGE)
    prefill.step()
    prefill.step()
    assert prefill.reports() == [(10 * PAGE, 2, 8)]
    prefill.loading.clear()
    prefill.step()
    assert len(prefill.said) == 2


@pytest.mark.parametrize("loads", [True, False])
def test_a_request_that_reads_nothing_is_told_of_too(prefill, loads):
    req = prefill.arrive(10 * PAGE, local=3 * PAGE, loads=loads)
    if loads:  # SGLang gives it up, or finds too little
        prefill.finds(req, PAGE, least=2 * PAGE)
        prefill.loading.clear()
        prefill.step()
    assert prefill.reports() == [(10 * PAGE, 3, 3)]


def test_a_request_that_is_aborted_before_that_is_not_told_of(prefill):
    req = prefill.arrive(10 * PAGE)
    relay_hooks.after_finish(None, prefill.tree, SimpleNamespace(rid=req.rid), None)
    assert prefill.load.held == 0 and prefill.departures == 1, "before the next look"
    prefill.step()
    assert prefill.said == [] and prefill.load.held == 0


def test_only_the_leader_rank_tells_of_requests_and_every_rank_counts_them(monkeypatch):
    engine = Engine(monkeypatch, Role.PREFILL, rank=1)
    engine.arrive(5 * PAGE, loads=False)
    assert engine.said == [] and engine.load.sequences == 1


def test_health_checks_and_warm_ups_do_not_count(prefill):
    req = request(host=FAKE_BOOTSTRAP_HOST)
    relay_hooks.before_prefetch_kvcache(prefill.scheduler, req)
    relay_hooks.after_prefetch_kvcache(None, prefill.scheduler, req)
    assert prefill.said == [] and prefill.load.sequences == 0


def test_what_is_to_be_read_becomes_what_is_ready_to_be_computed(prefill):
    req = prefill.arrive(10 * PAGE, local=2 * PAGE)
    assert (prefill.load.sequences, prefill.load.tokens) == (1, 10 * PAGE)
    prefill.finds(req, 6 * PAGE)
    prefill.scheduler.waiting_queue.append(req)
    prefill.step()
    assert (prefill.load.read_queue_bytes, prefill.load.ready_tokens) == (6 * PAGE_BYTES, 0)
    prefill.loading.clear()
    prefill.step()
    assert (prefill.load.read_queue_bytes, prefill.load.ready_tokens) == (0, 2 * PAGE)
    prefill.scheduler.waiting_queue.clear()
    prefill.step()
    assert prefill.load.ready_tokens == 0, "it is computed"
    assert prefill.load.sequences == 1, "its KV is not sent"
    req.finished_reason = FINISH_LENGTH(0)
    prefill.step()
    assert (prefill.load.sequences, prefill.load.tokens, prefill.load.held) == (0, 0, 0)


@pytest.mark.parametrize("overlap", [False, True])
def test_the_compute_rate_counts_time_with_a_batch_under_way_only(prefill, overlap):
    prefill.scheduler.enable_overlap = overlap
    prefill.step()

    def passes(seconds: float, launched: int = 0) -> None:
        prefill.now_s += seconds
        prefill.scheduler.processed_tokens_counter += launched
        prefill.step()

    for _ in range(3):
        if overlap:  # a batch is launched at once, and waited for in the next iteration
            passes(0.001, launched=400)
            for _ in range(3):
                passes(0.5, launched=400)
            passes(0.5)
        else:
            for _ in range(4):
                passes(0.5, launched=400)
        passes(30.0)
    assert prefill.load.compute_rate_tokens_per_s == pytest.approx(800)


def test_memory_that_is_counted_some_other_way_is_not_known_and_no_fault(prefill):
    prefill.step()
    assert prefill.load.device_free_tokens == 1000
    before = prefill.load.faults  # of the whole process
    del prefill.tree.evictable_size
    prefill.step()
    assert prefill.load.device_free_tokens == 0 and prefill.load.faults == before


def test_a_decode_engine_tells_of_its_requests_and_counts_them_to_their_end(monkeypatch):
    decode = Engine(monkeypatch, Role.DECODE)
    queue = queue_of(decode.scheduler)
    queue.tree_cache = decode.tree
    relay_hooks.before_pop_preallocated(queue)
    req = request(100)
    decode_req = DecodeRequest(req, kv_receiver=None)
    queue.queue.append(decode_req)
    relay_hooks.after_prealloc_add(None, queue, req)
    assert decode.reports() == [(100, 0, None)]
    assert (decode.load.sequences, decode.load.tokens) == (1, 100), "a heartbeat after its report counts it"
    relay_hooks.before_pop_preallocated(queue)
    assert decode.load.device_free_tokens == 900
    queue.queue.clear()
    decode.scheduler.running_batch.reqs.append(req)
    relay_hooks.before_pop_preallocated(queue)
    assert (decode.load.sequences, decode.load.device_free_tokens) == (1, 1000)
    req.finished_reason = FINISH_LENGTH(4)
    relay_hooks.before_pop_preallocated(queue)
    assert decode.load.sequences == 0


def test_a_retracted_request_is_not_told_of_again(monkeypatch):
    decode = Engine(monkeypatch, Role.DECODE)
    queue = queue_of(decode.scheduler)
    req = request(100)
    queue.queue.append(DecodeRequest(req, kv_receiver=None))
    relay_hooks.after_prealloc_add(None, queue, req, is_retracted=True)
    assert decode.said == []


@pytest.mark.parametrize(
    ("place", "rank", "ranks"),
    [
        ({}, 0, 1),
        ({"attn_tp_rank": 1, "attn_tp_size": 2}, 1, 2),
        ({"attn_tp_rank": 1, "attn_tp_size": 2, "pp_rank": 1, "pp_size": 2}, 3, 4),
        ({"attn_cp_rank": 1, "attn_cp_size": 2, "attn_tp_rank": 1, "attn_tp_size": 2}, 3, 4),
        # With DP attention each DP rank is an engine of its own, with the tensor ranks that are left to it.
        ({"attn_dp_rank": 1, "attn_dp_size": 2}, 0, 1),
    ],
)
def test_every_process_of_an_engine_that_reads_has_a_rank_of_its_own(place, rank, ranks):
    alone = dict.fromkeys(("attn_tp_rank", "attn_cp_rank", "attn_dp_rank", "pp_rank"), 0)
    alone |= dict.fromkeys(("attn_tp_size", "attn_cp_size", "attn_dp_size", "pp_size"), 1)
    given = alone | place
    # As SGLang lays its ranks out; it accepts nothing else.
    given["tp_size"] = given["attn_dp_size"] * given["attn_cp_size"] * given["attn_tp_size"]
    given |= {"moe_tp_size": given["tp_size"], "moe_ep_size": 1, "moe_dp_size": 1}
    within = given["attn_dp_rank"] * given["attn_cp_size"] + given["attn_cp_rank"]
    given["tp_rank"] = within * given["attn_tp_size"] + given["attn_tp_rank"]
    with get_parallel().override(**given):
        assert relay_engine._rank() == (rank, ranks)
