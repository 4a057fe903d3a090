"""What a rank counts of itself, and that an engine's metrics port has it beside SGLang's own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path as FilePath
from types import SimpleNamespace

import pytest
from data_path_world import WAIT_S
from engine_parts import EngineParts
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestOutcome
from sglang.srt.utils.common import add_prometheus_middleware
from test_data_path_work import DecodeEngine, request

from dualpath_sgl.lanes.open_loads import OpenLoads
from dualpath_sgl.metrics import helpers, hooks, prompts, rank
from dualpath_sgl.metrics.rank import GAUGES, RankMetrics
from dualpath_sgl.metrics.sampler import Sampler
from dualpath_sgl.relay.client.counts import Counts, LaneCounts
from dualpath_sgl.relay.resident.server import Served
from dualpath_sgl.threads import faults
from scheduler_svc.wire.protocol import Mode, Outcome, Path, RankInfo, Role, Workload

PAGE = 16
PAGE_BYTES = 1000


class Rank:
    def __init__(self, role: Role = Role.PREFILL, mode: Mode = Mode.DECODE_SIDE) -> None:
        self.registry = CollectorRegistry()
        self.info = RankInfo(
            engine_id="e", role=role, url="http://127.0.0.1:1", fingerprint="f", page_size=PAGE,
            page_bytes=PAGE_BYTES, mode=mode,
        )  # fmt: skip
        self.metrics = RankMetrics(self.info, self.registry)

    def value(self, name: str, **labels: str) -> float | None:
        own = {"engine": "e", "role": self.info.role.value, "rank": "0"}
        return self.registry.get_sample_value(f"dualpath_rank_{name}", own | labels)

    def pages(self) -> dict[str, float]:
        found = {
            sample.labels["source"]: sample.value
            for family in self.registry.collect()
            for sample in family.samples
            if sample.name == "dualpath_rank_pages_total"
        }
        return {source: count for source, count in found.items() if count}


def work(lane: str, first: int, end: int, queue_s: float = 0.0, busy_s: float = 1.0):
    """What a lane did, as `PageLoad.lane_work` has it."""
    from dualpath_sgl.lanes.page_load import LaneWork

    made = LaneWork(lane, first, end)
    made.begin()
    made.moved(end - first, (end - first) * PAGE_BYTES)
    made.queued_ns, made.ended_ns = made.begun_ns - int(queue_s * 1e9), made.begun_ns + int(busy_s * 1e9)
    return made


# -- on the engine's port ------------------------------------------------------------------------------


def test_every_rank_is_on_the_engine_s_metrics_port_beside_sglang_s_metrics(tmp_path, monkeypatch):
    """The server's side is SGLang's own, as in its HTTP server."""
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    program = FilePath(__file__).with_name("rank_counts.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, program, str(number)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    try:
        assert [one.stdout.readline() for one in ranks] == ["counted\n"] * 2
        deadline_s = time.monotonic() + WAIT_S
        while not all((found := scraped()).get(("dualpath_rank_sequences", number)) for number in "01"):
            assert time.monotonic() < deadline_s, found
            time.sleep(0.05)
    finally:
        for one in ranks:
            one.communicate("", timeout=WAIT_S)
    assert {found["dualpath_rank_sequences", "0"], found["dualpath_rank_sequences", "1"]} == {10, 11}
    assert found["dualpath_rank_scheduler_connected", "0"] == 1
    assert found["dualpath_rank_scheduler_connected", "1"] == 0
    for number in "01":
        assert found["dualpath_rank_fallbacks_total", number, "scheduler away"] == 1
        assert found["dualpath_rank_requests_total", number, "fallback", "split"] == 1
        assert found["dualpath_rank_requests_total", number, "ok", "decode"] == 0, "it exists from the start"


def scraped() -> dict[tuple[str, ...], float]:
    """By name, rank and further labels, in their names' order, what SGLang's own route answers."""
    app = FastAPI()
    add_prometheus_middleware(app)
    text = TestClient(app).get("/metrics").text
    return {
        (
            sample.name,
            sample.labels["rank"],
            *(sample.labels[name] for name in sorted(sample.labels.keys() - {"engine", "role", "rank"})),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


# -- requests and their lanes --------------------------------------------------------------------------


def test_bytes_are_told_by_path_source_and_outcome_and_waiting_apart_from_transfers():
    rank_ = Rank()
    lanes = [work("peer", 0, 3, queue_s=0.2, busy_s=0.5), work("store", 3, 5, queue_s=4.0, busy_s=2.0)]
    rank_.metrics.room_over("r", Path.SPLIT, Outcome.OK, None, lanes)
    rank_.metrics.read_unplanned("r", [work("store", 0, 1)])
    assert rank_.value("kv_bytes_total", path="split", source="peer", outcome="ok") == 3 * PAGE_BYTES
    assert rank_.value("kv_bytes_total", path="split", source="store", outcome="ok") == 2 * PAGE_BYTES
    assert rank_.value("kv_bytes_total", path="unplanned", source="store", outcome="ok") == PAGE_BYTES
    assert rank_.value("queue_seconds_sum", lane="peer") == pytest.approx(0.2)
    assert rank_.value("transfer_seconds_sum", lane="peer") == pytest.approx(0.5)
    assert rank_.value("queue_seconds_count", lane="store") == 2


def test_an_engine_counts_its_fallback_while_the_scheduler_is_away(monkeypatch):
    engine = DecodeEngine(monkeypatch)
    engine.arrive(request())
    engine.step()

    def value(name: str, **labels: str) -> float | None:
        own = {"engine": "decode-0", "role": "decode", "rank": "0"}
        return engine.parts.registry.get_sample_value(f"dualpath_rank_{name}", own | labels)

    assert value("requests_total", path="unplanned", outcome="fallback") == 1
    assert value("fallbacks_total", reason="scheduler away") == 1


def test_reasons_that_never_end_are_counted_together(monkeypatch):
    monkeypatch.setattr(rank, "MOST_REASONS", 2)
    rank_ = Rank()
    for reason in "abcda":
        rank_.metrics.room_over("r", None, Outcome.FALLBACK, reason, [])
    assert [rank_.value("fallbacks_total", reason=reason) for reason in ("a", "b", "c", "other")] == [
        2,
        1,
        None,
        2,
    ]


def test_a_count_that_fails_costs_the_room_nothing(monkeypatch):
    parts = EngineParts(Role.DECODE, connected=False)
    before = faults.count()
    monkeypatch.setattr(parts.metrics, "_requests", None)
    engine = SimpleNamespace(
        room=1, rid="r", page_load=None, plan=None, fallback_reason=None, traceparent=None
    )
    parts.side._reports.done(engine, Outcome.OK)
    assert len(parts.sent) == 1 and faults.count() == before + 1


# -- where a prompt's pages came from ------------------------------------------------------------------


def arrive(rank_: Rank, pages: int, local: int, found: int):
    """A request passes SGLang's arrival path; the store has `found` pages beyond the `local` ones."""
    req = request(pages * PAGE + 5)
    hooks.before_prefetch_kvcache(None, req)
    req.storage_prefetch_last_match_len = local * PAGE
    hooks.after_prefetch_kvcache(None, None, req)
    operation = SimpleNamespace(request_id=req.rid)
    hooks.after_sync_prefetch_hit_query(
        found * PAGE, SimpleNamespace(prefetch_threshold=2 * PAGE), operation, 0
    )
    return req


def finish(req, device: int, host: int, storage: int, outcome=CacheRequestOutcome.SUCCESS) -> None:
    """As SGLang's prefill has seen it."""
    req.cached_tokens_device, req.cached_tokens_host = device * PAGE, host * PAGE
    req.cached_tokens_storage = storage * PAGE
    hooks.after_finish(None, None, SimpleNamespace(rid=req.rid), outcome)


@pytest.fixture
def pe(monkeypatch) -> Rank:
    made = Rank()
    monkeypatch.setattr(rank, "_current", made.metrics)
    return made


def test_needed_pages_are_those_held_forwarded_read_or_recomputed(pe):
    req = arrive(pe, pages=20, local=4, found=10)
    pe.metrics.room_over(req.rid, Path.SPLIT, Outcome.OK, None, [work("peer", 4, 7), work("store", 7, 12)])
    finish(req, device=1, host=3, storage=8)
    assert pe.value("prompt_pages_total") == 20
    assert pe.value("needed_pages_total") == 14
    assert pe.pages() == {"device": 1, "host": 3, "peer": 3, "store": 5, "recomputed": 2}
    assert pe.value("kv_bytes_total", path="split", source="host", outcome="ok") == 3 * PAGE_BYTES


def test_a_page_that_two_lanes_count_makes_the_sum_too_large(pe):
    req = arrive(pe, pages=20, local=0, found=8)
    pe.metrics.room_over(req.rid, Path.SPLIT, Outcome.OK, None, [work("peer", 0, 5), work("store", 4, 8)])
    finish(req, device=0, host=0, storage=8)
    assert sum(pe.pages().values()) == 9 > pe.value("needed_pages_total")


def test_what_is_too_short_to_be_loaded_is_not_needed(pe):
    finish(arrive(pe, pages=20, local=4, found=1), device=4, host=0, storage=0)
    assert pe.value("needed_pages_total") == 4 and pe.pages() == {"device": 4}


def test_an_aborted_request_s_prompt_counts_as_nothing(pe):
    finish(arrive(pe, pages=20, local=4, found=8), 4, 0, 0, CacheRequestOutcome.ABORT)
    assert pe.value("prompt_pages_total") == 0 and pe.pages() == {}


def test_health_checks_and_warm_ups_count_as_nothing(pe):
    from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST

    req = request(PAGE, host=FAKE_BOOTSTRAP_HOST)
    hooks.before_prefetch_kvcache(None, req)
    finish(req, 1, 0, 0)
    assert pe.value("prompt_pages_total") == 0


def test_prompts_that_sglang_never_finishes_are_forgotten(pe, monkeypatch):
    monkeypatch.setattr(prompts, "MOST_PROMPTS", 2)
    first, *others = [arrive(pe, pages=5, local=1, found=0) for _ in range(3)]
    for req in (first, *others):
        finish(req, device=1, host=0, storage=0)
    assert pe.value("prompt_pages_total") == 10


def test_in_mode_relay_what_sglang_found_in_its_storage_is_the_store_s(monkeypatch):
    pe = Rank(mode=Mode.RELAY)
    monkeypatch.setattr(rank, "_current", pe.metrics)
    finish(arrive(pe, pages=20, local=4, found=10), device=2, host=2, storage=9)
    assert pe.pages() == {"device": 2, "host": 2, "store": 9, "recomputed": 1}
    assert pe.value("requests_total", path="relay", outcome="ok") == 1


# -- once a second -------------------------------------------------------------------------------------


def test_every_count_of_helpers_and_every_gauge_has_a_text():
    assert {one.name for one in fields(LaneCounts)} == helpers.LANE.keys()
    assert {one.name for one in fields(Counts)} == helpers.LOADS.keys() | helpers.KINDS.keys()
    assert {one.name for one in fields(Served)} == helpers.SERVED.keys()
    assert GAUGES.keys() < set(Workload.__struct_fields__)


def test_what_helpers_brought_grows_and_goes_on_with_storage_that_is_attached_anew():
    pe = Rank(mode=Mode.RELAY)
    first = Counts(own_bytes=5, relays={"a": LaneCounts(bytes=7, wait_s=0.5)})
    for counts in (first, first, Counts(own_bytes=2, relays={"a": LaneCounts(bytes=1)})):
        pe.metrics.helpers.now(counts)
        counts.residents["d"] = LaneCounts(bytes=10, given_back=3)
    assert pe.value("load_own_bytes_total") == 7
    assert pe.value("helper_bytes_total", helper="a", kind="relay") == 8
    assert pe.value("helper_wait_seconds_total", helper="a", kind="relay") == 0.5
    assert pe.value("helper_given_back_total", helper="d", kind="decode") == 3
    brought = {source: pe.value("kv_bytes_total", path="relay", source=source, outcome="ok")
               for source in ("store", "relay", "peer")}  # fmt: skip
    assert brought == {"store": 7, "relay": 8, "peer": 10}


def test_with_decode_side_loads_the_store_lane_counts_what_helpers_brought_once():
    pe = Rank()
    pe.metrics.helpers.now(Counts(own_bytes=5, relays={"a": LaneCounts(bytes=7)}))
    assert pe.value("kv_bytes_total", path="relay", source="store", outcome="ok") is None
    assert pe.value("helper_bytes_total", helper="a", kind="relay") == 7


def test_links_tell_what_came_as_it_came():
    pe = Rank()
    load = OpenLoads()
    for lane, count in (("store", 5), ("peer", 3), ("store", 2)):
        load.arrived(lane, count)
        pe.metrics.links(load.arrived_bytes, None)
    assert (pe.value("link_bytes_total", link="store"), pe.value("link_bytes_total", link="peer")) == (7, 3)
    assert pe.value("link_bytes_total", link="relay") == 0

    helped = Rank()
    counts = Counts(own_bytes=4, relays={"a": LaneCounts(bytes=7)}, residents={"d": LaneCounts(bytes=1)})
    helped.metrics.links({"store": 11, "peer": 3}, counts)
    links = {link: helped.value("link_bytes_total", link=link) for link in ("store", "relay", "peer")}
    assert links == {"store": 4, "relay": 7, "peer": 4}, "relays took part in what the store lane read"


def test_what_a_decode_engine_gave_by_key_is_counted():
    de = Rank(Role.DECODE, Mode.RELAY)
    served = Served(bytes=4)
    for _ in range(2):
        de.metrics.helpers.served(served)
        served.bytes += 1
    assert de.value("served_bytes_total") == 5


def test_a_sample_that_fails_is_a_fault_and_the_next_one_tells_of_it():
    pe = Rank()
    answers = [ZeroDivisionError(), Workload(sequences=3, held=2)]

    def workload() -> Workload:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    before = faults.count()
    sampler = Sampler(pe.metrics, workload=workload, connected=lambda: True, counts=lambda: None)
    faults.guarded(sampler.sample)()
    sampler.sample()
    assert (pe.value("sequences"), pe.value("held"), pe.value("scheduler_connected")) == (3, 2, 1)
    assert pe.value("faults_total") == faults.count() >= before + 1
