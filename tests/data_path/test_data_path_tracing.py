"""What engines export about a request: SGLang's own trace contexts, DualPath's hooks around them, real exporters."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST, DisaggregationMode
from sglang.srt.observability import trace as sglang_trace
from sglang.srt.observability.req_time_stats import APIServerReqTimeStats, ReqTimeStatsBase

from dualpath_sgl.lanes.page_load import LaneWork
from dualpath_sgl.restore import RestoreGuard
from dualpath_sgl.room_reports import RoomRequest
from dualpath_sgl.spans import joining, stages
from dualpath_sgl.spans.request_span import ChosenIds, RequestSpans
from dualpath_sgl.spans.tracing import record_load, traceparent_of
from scheduler_svc.wire.protocol import Loaded, Outcome, Path, Plan, Role

ROOM = 2**63 - 25
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = CALLER[:-2] + "00"
PLAN = Plan(
    room=ROOM,
    path=Path.SPLIT,
    prefill_id="prefill-0",
    decode_id="decode-0",
    prefill_local_pages=2,
    decode_local_pages=0,
    hit_pages=10,
    split_page=6,
    policy="split",
)


class Req:
    def __init__(self, context) -> None:
        self.rid, self.bootstrap_room = "r", ROOM
        self.origin_input_ids, self.output_ids = [1] * 165, [2] * 3
        self.time_stats = SimpleNamespace(trace_ctx=context, disagg_mode=DisaggregationMode.DECODE)


class Exported:
    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self._processor = SimpleSpanProcessor(self._exporter)

    def tracer(self, ids=None):
        provider = TracerProvider(id_generator=ids)
        provider.add_span_processor(self._processor)
        return provider.get_tracer("dualpath")

    @property
    def spans(self):
        return {span.name: span for span in self._exporter.get_finished_spans()}


@pytest.fixture
def exported(monkeypatch):
    """SGLang's tracer and ours, as if the process exported there."""
    made = Exported()
    monkeypatch.setattr(sglang_trace, "tracer", made.tracer(sglang_trace.TraceCustomIdGenerator()))
    monkeypatch.setattr(sglang_trace, "opentelemetry_initialized", True)
    return made


@pytest.fixture(autouse=True)
def usual_sampler():
    joining._sampler.cache_clear()
    yield
    joining._sampler.cache_clear()


def arrives(mode: DisaggregationMode, headers: dict[str, str]) -> APIServerReqTimeStats:
    """A request in an engine's HTTP process."""
    stats = APIServerReqTimeStats(disagg_mode=mode)
    joining.around_init_trace_ctx(ReqTimeStatsBase.init_trace_ctx, stats, "r", ROOM, headers)
    stats.set_created_time()
    return stats


def served(exported: Exported, headers: dict[str, str], loaded: Loaded | None = None) -> None:
    """A request through both engines, as SGLang carries its context from process to process."""
    ids = ChosenIds()
    whole = RequestSpans(exported.tracer(ids), ids, "")
    both = [arrives(mode, headers) for mode in (DisaggregationMode.PREFILL, DisaggregationMode.DECODE)]
    req = Req(pickle.loads(pickle.dumps(both[1].trace_ctx)))
    whole.begin(req, traceparent_of(req.time_stats))
    whole.decided(ROOM, PLAN, None)
    if loaded is not None:
        whole.loaded(loaded)
    whole.end(ROOM, "another")
    whole.end(ROOM, "r")
    whole.end(ROOM, "r")
    for stats in both:
        stats.set_finished_time()


def test_a_request_without_a_callers_trace_is_one_tree_over_both_engines(exported):
    served(
        exported,
        {},
        Loaded(room=ROOM, prefill_read_bytes=4, decode_read_bytes=6, forwarded_bytes=5, fallbacks=("store",)),
    )
    spans = exported.spans
    root = spans["request split"]
    assert root.parent is None
    assert {span.context.trace_id for span in spans.values()} == {root.context.trace_id}
    for name in ("prefill Req r", "decode Req r"):
        assert spans[name].parent.span_id == root.context.span_id
    assert dict(root.attributes) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.usage.input_tokens": 165,
        "gen_ai.usage.output_tokens": 3,
        "dualpath.room": str(ROOM),
        "dualpath.path": "split",
        "dualpath.split.pages": 6,
        "dualpath.hit.pages": 10,
        "dualpath.prefill.engine": "prefill-0",
        "dualpath.decode.engine": "decode-0",
        "dualpath.prefill.read_bytes": 4,
        "dualpath.decode.read_bytes": 6,
        "dualpath.forwarded_bytes": 5,
        "dualpath.fallback.reason": "store",
        "error.type": "dualpath.fallback",
    }
    assert (root.status.status_code, root.status.description) == (StatusCode.ERROR, "store")
    assert root.start_time == spans["decode Req r"].start_time <= root.end_time


def test_a_callers_trace_is_continued_and_has_no_second_root(exported):
    served(exported, {"traceparent": CALLER})
    spans = exported.spans
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {CALLER.split("-")[1]}
    assert {f"{spans[name].parent.span_id:016x}" for name in ("prefill Req r", "decode Req r")} == {
        CALLER.split("-")[2]
    }
    assert spans["request split"].parent.span_id == spans["decode Req r"].context.span_id
    assert spans["request split"].status.status_code is StatusCode.UNSET


def test_a_caller_that_does_not_want_to_be_recorded_is_not(exported):
    served(exported, {"traceparent": UNSAMPLED})
    assert exported.spans == {}


@pytest.mark.parametrize(("ratio", "least", "most"), [("0", 0, 0), ("0.25", 60, 140), ("1", 400, 400)])
def test_a_ratio_decides_about_requests_without_a_caller_alike_on_every_engine(
    monkeypatch, ratio, least, most
):
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", ratio)
    headers = [joining.header_of_room(room)["traceparent"] for room in range(400)]
    assert least <= sum(header.endswith("-01") for header in headers) <= most
    joining._sampler.cache_clear()  # another process
    assert headers == [joining.header_of_room(room)["traceparent"] for room in range(400)]


def test_an_engine_of_no_pair_is_left_alone(exported):
    first, second = (arrives(DisaggregationMode.NULL, {}) for _ in range(2))
    for stats in (first, second):
        stats.set_finished_time()
    roots = [span for span in exported._exporter.get_finished_spans() if span.parent is None]
    assert len({span.context.trace_id for span in roots}) == 2


@pytest.mark.parametrize(
    ("host", "traced"),
    [
        (FAKE_BOOTSTRAP_HOST, False),
        ([FAKE_BOOTSTRAP_HOST] * 2, False),
        ("127.0.0.1", True),
        (["127.0.0.1", FAKE_BOOTSTRAP_HOST], True),
        (None, True),
    ],
)
def test_probes_and_warm_ups_are_not_traced(host, traced):
    manager, seen = SimpleNamespace(enable_trace=True), []

    def original(manager, obj, request=None):
        seen.append(manager.enable_trace)
        raise ValueError("as for a duplicate id")

    with pytest.raises(ValueError, match="duplicate"):
        joining.around_init_req_state(original, manager, SimpleNamespace(bootstrap_host=host), None)
    assert seen == [traced] and manager.enable_trace


# -- what a side did for a room ------------------------------------------------------------------------

MS = 1_000_000
REPORTED = 1_700_000_000_000 * MS


def lane(
    kind: str, *, first: int, asked_end: int, queued: int, calls: list[tuple[int, int, int, int]]
) -> LaneWork:
    """`calls`: begin and end in milliseconds after the report, pages, bytes."""
    work = LaneWork(kind, first, asked_end)
    work.queued_ns = REPORTED + queued * MS
    for begun, ended, pages, size in calls:
        begun_ns, ended_ns = REPORTED + begun * MS, REPORTED + ended * MS
        work._call_ns, work.begun_ns = begun_ns, work.begun_ns or begun_ns
        work.moved(pages, size)
        work.busy_ns += (ended_ns - begun_ns) - max(0, work.ended_ns - begun_ns)
        work.batches[-1] = work.batches[-1]._replace(begun_ns=begun_ns, ended_ns=ended_ns)
        work.ended_ns = ended_ns
    return work


def recorded(exported: Exported, side: Role, outcome: Outcome, *lanes: LaneWork, **changes):
    request = RoomRequest(room=ROOM, rid="r", prompt_tokens=165, prompt_hash="", traceparent=CALLER)
    request.reported_ns, request.decided_ns, request.plan = REPORTED, REPORTED + 3 * MS, PLAN
    if lanes:
        request.page_load = SimpleNamespace(lane_work=list(lanes), pages=8, prefix=8)
    for name, value in changes.items():
        setattr(request, name, value)
    record_load(exported.tracer(), request, side, outcome)
    return exported.spans


def milliseconds(span) -> tuple[float, float]:
    return (span.start_time - REPORTED) / MS, (span.end_time - REPORTED) / MS


def test_each_way_of_kv_has_its_name_its_wait_and_its_own_time(exported):
    forward = lane("peer", first=2, asked_end=6, queued=4, calls=[(30, 31, 2, 2000), (60, 62, 2, 2000)])
    read = lane("store", first=6, asked_end=10, queued=5, calls=[(20, 50, 4, 4000)])
    spans = recorded(exported, Role.PREFILL, Outcome.OK, forward, read)
    load = spans["load"]
    assert f"{load.parent.span_id:016x}" == CALLER.split("-")[2]
    assert set(spans) == {
        "load", "plan wait", "decode to prefill wait", "decode to prefill", "store to prefill wait", "store to prefill",
    }  # fmt: skip
    assert all(span.parent.span_id == load.context.span_id for span in spans.values() if span is not load)
    assert milliseconds(spans["plan wait"]) == (0, 3)
    assert milliseconds(spans["decode to prefill wait"]) == (4, 30)
    assert milliseconds(spans["decode to prefill"]) == (30, 62)
    assert milliseconds(spans["store to prefill wait"]) == (5, 20)
    assert milliseconds(spans["store to prefill"]) == (20, 50)
    assert dict(spans["decode to prefill"].attributes) == {
        "dualpath.lane": "peer",
        "dualpath.bytes": 4000,
        "dualpath.transfers": 2,
        "dualpath.pages.first": 2,
        "dualpath.pages.end": 6,
        "dualpath.pages.asked_end": 6,
        "dualpath.queue_wait_s": pytest.approx(0.026),
        "dualpath.busy_s": pytest.approx(0.003),
        "dualpath.source_wait_s": pytest.approx(0.029),
        "dualpath.bandwidth_bytes_per_s": pytest.approx(4000 / 0.003),
    }
    events = spans["decode to prefill"].events
    assert [(event.name, event.attributes["dualpath.bytes"]) for event in events] == [("batch", 2000)] * 2
    told = {key.removeprefix("dualpath."): value for key, value in load.attributes.items()}
    assert told == {
        "room": str(ROOM), "side": "prefill", "outcome": "ok", "path": "split", "split.pages": 6, "hit.pages": 10,
        "local.pages": 2, "asked.pages": 8, "loaded.pages": 8, "bytes": 8000,
    }  # fmt: skip
    assert load.status.status_code is StatusCode.UNSET


def test_a_decode_engines_read_has_a_name_of_its_own(exported):
    read = lane("store", first=0, asked_end=6, queued=4, calls=[(5, 9, 6, 6000)])
    assert {"store to decode", "store to decode wait"} <= set(
        recorded(exported, Role.DECODE, Outcome.OK, read)
    )


@pytest.mark.parametrize("side", Role)
def test_a_fallback_has_a_span_with_its_reason_also_when_no_lane_had_begun(exported, side):
    gone = {"plan": None, "decided_ns": 0, "fallback_reason": "scheduler away"}
    spans = recorded(exported, side, Outcome.FALLBACK, **gone)
    assert set(spans) == {"load", "plan wait"}
    status = spans["load"].status
    assert (status.status_code, status.description) == (StatusCode.ERROR, "scheduler away")
    assert spans["load"].attributes["dualpath.fallback.reason"] == "scheduler away"
    assert spans["plan wait"].end_time == spans["load"].end_time


def test_pages_that_a_lane_did_not_bring_are_named(exported):
    short = lane("store", first=6, asked_end=10, queued=4, calls=[(5, 9, 1, 1000)])
    never = LaneWork("peer", 2, 6)
    spans = recorded(exported, Role.PREFILL, Outcome.FALLBACK, never, short, fallback_reason="peer silent")
    assert spans["store to prefill"].status.description == "pages 7 to 10 did not come this way"
    assert "decode to prefill" not in spans and "decode to prefill wait" in spans


def test_a_room_for_which_nothing_was_to_be_done_has_no_span(exported):
    assert recorded(exported, Role.PREFILL, Outcome.OK, plan=None) == {}


@pytest.mark.parametrize("traceparent", [None, UNSAMPLED])
def test_nothing_is_told_of_a_request_that_nobody_traces(exported, traceparent):
    assert recorded(exported, Role.PREFILL, Outcome.FALLBACK, traceparent=traceparent) == {}


# -- what SGLang does with host memory -------------------------------------------------------------------


def test_restore_ends_when_the_pages_are_on_the_device_not_when_the_request_is(exported):
    guard = RestoreGuard(exported.tracer())
    req = Req(arrives(DisaggregationMode.DECODE, {"traceparent": CALLER}).trace_ctx)
    status = SimpleNamespace(name="PENDING")
    request = SimpleNamespace(
        req=req, hicache_restore_status=status, prefix_match=SimpleNamespace(restore_token_count=96)
    )
    guard.load_back_queued(request)
    guard.look([request])
    assert exported.spans == {}
    status.name = "READY"
    guard.look([request])
    guard.look([request])
    (span,) = exported.spans.values()
    assert span.name == "restore" and span.attributes["dualpath.tokens"] == 96


def test_load_back_lasts_as_long_as_the_device_copied(exported, monkeypatch):
    """Mocks a device's clock, which a CPU has not."""
    monkeypatch.setattr(stages, "_tracer", exported.tracer())
    tree = SimpleNamespace(ongoing_load_back={"node": 1})
    context = arrives(DisaggregationMode.PREFILL, {"traceparent": CALLER}).trace_ctx
    req = SimpleNamespace(
        time_stats=SimpleNamespace(trace_ctx=context, disagg_mode=DisaggregationMode.PREFILL)
    )
    start = SimpleNamespace(elapsed_time=lambda finish: 0.001)
    ack = SimpleNamespace(node_ids=["node"], timing_enabled=True, start_event=start, finish_event=None)
    stages.after_init_load_back((64, None), tree, SimpleNamespace(best_match_node="node", req=req))
    stages.around_start_loading(lambda controller: 0, SimpleNamespace(ack_load_queue=[ack]))
    stages.after_loading_check(None, tree)
    assert "load_back" not in exported.spans
    tree.ongoing_load_back.clear()
    stages.after_loading_check(None, tree)
    span = exported.spans["load_back"]
    assert span.end_time - span.start_time == 1000 and span.attributes["dualpath.tokens"] == 64
