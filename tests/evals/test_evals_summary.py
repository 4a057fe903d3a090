"""Summary, report, counters and the demo's conditions."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, start_http_server
from pydantic import ValidationError
from rich.console import Console

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.compare import measure, picture, report
from dualpath_sgl.evals.compare.demo import split_request, tell, unmet
from dualpath_sgl.evals.compare.run import MODES, EvalOptions, cluster_config, evaluate, storage_limit_s
from dualpath_sgl.evals.compare.summary import (
    ByRole,
    EngineRead,
    Mismatch,
    ModeResult,
    PathCounts,
    Quantiles,
    Summary,
    WorkloadInfo,
)
from dualpath_sgl.evals.spans.requests import RequestFacts
from dualpath_sgl.evals.spans.traces import Span, Trace, read_traces
from dualpath_sgl.launch.config.cluster import ClusterConfig, Group, Mode, Store
from scheduler_svc.wire.protocol import EngineStatus, RankInfo, Role, Status, Workload
from scheduler_svc.wire.protocol import Path as LoadPath

ZERO = Quantiles(p50=0.1, p99=0.2, mean=0.15)
CLUSTER = ClusterConfig(name="c", device="cpu")


def result(mode: str, **changes) -> ModeResult:
    values = dict(
        mode=mode,
        cluster_mode="dualpath",
        policy="shorter_queue",
        tokens_equal=True,
        mismatches=[],
        requests=72,
        sessions=6,
        job_s=12.0,
        ttft_s=ZERO,
        ttst_s=ZERO,
        tpot_s=ZERO,
        e2e_s=ZERO,
        hit_rate=0.8,
        engines={"prefill-0": EngineRead(role="prefill", store_read_bytes=5, forwarded_bytes=9)},
        store_read_bytes=ByRole(prefill=5, decode=7),
        forwarded_bytes=9,
        paths=PathCounts(none=1, prefill=30, decode=41),
        fallbacks={},
        duplicate_store_pages=0,
    )
    return ModeResult(**(values | changes))


def summary(*results: ModeResult) -> Summary:
    info = WorkloadInfo(
        source="x",
        sessions=6,
        requests=72,
        scale_factor=0.02,
        longest_tokens=1500,
        prompt_tokens=1,
        output_tokens=1,
        raw_hit_rate=0.9,
        hit_rate=0.88,
        page_size=16,
        concurrency=6,
        seed=1,
    )
    return Summary.of(info, {r.mode: r for r in results}, traces=72)


def test_a_one_mode_summary_has_the_modes_numbers_at_its_top_and_survives_json():
    document = json.loads(summary(result("dualpath")).model_dump_json())
    assert document["tokens_equal"] is True
    assert (document["requests"], document["sessions"]) == (72, 6)
    assert document["paths"] == {"none": 1, "prefill": 30, "decode": 41, "split": 0}
    assert document["store_read_bytes"] == {"prefill": 5, "decode": 7}
    assert (document["forwarded_bytes"], document["duplicate_store_pages"]) == (9, 0)
    assert set(document["modes"]) == {"dualpath"}
    assert Summary.model_validate(document).model_dump() == document


def test_a_summary_of_several_modes_adds_up_and_one_wrong_token_is_enough():
    wrong = Mismatch(session="s", turn=3, expected=[1], got=[2])
    both = summary(result("dualpath"), result("decode", tokens_equal=False, mismatches=[wrong]))
    assert not both.tokens_equal and both.requests == 144 and both.store_read_bytes.decode == 14
    text = report.markdown(both)
    assert "session s turn 3" in text and "88.0%" in text and "90.0%" in text and "NO (1)" in text


def test_the_schema_refuses_unknown_fields_and_impossible_values():
    with pytest.raises(ValidationError):
        ModeResult.model_validate(result("x").model_dump() | {"extra": 1})
    with pytest.raises(ValidationError):
        result("x", hit_rate=1.5)


SPLIT = Trace(traceID="a", spans=[Span(spanID="b", startTime=0)])


def demo_summary(basic: dict | None = None, **changes) -> Summary:
    split = {"paths": PathCounts(none=1, prefill=30, decode=3, split=38), **changes}
    upstream = {"policy": None, "paths": PathCounts(), "duplicate_store_pages": None, **(basic or {})}
    return summary(result("basic", **upstream), result("dualpath", **split))


def test_the_demo_is_content_only_when_every_condition_holds():
    assert unmet(demo_summary(), SPLIT) == []
    for change in (
        {"tokens_equal": False},
        {"basic": {"tokens_equal": False}},
        {"requests": 59},
        {"basic": {"requests": 59}},
        {"paths": PathCounts(prefill=5, decode=41)},
        {"store_read_bytes": ByRole(prefill=5)},
        {"store_read_bytes": ByRole(decode=5)},
        {"forwarded_bytes": 0},
        {"duplicate_store_pages": 1},
    ):
        assert len(unmet(demo_summary(**change), SPLIT)) == 1, change
    assert unmet(demo_summary(), None) == ["traces.json shows a request that both engines read"]


def test_the_example_is_the_request_that_both_engines_read_most_evenly():
    demo = read_traces(Path(__file__).parent / "demo_traces.json")
    example = split_request(demo)
    assert RequestFacts.of(example).path == "split"
    assert split_request([trace for trace in demo if trace is not example]) is None


def test_the_limit_is_what_the_storage_links_alone_need():
    slow = CLUSTER.model_copy(update={"store": Store(read_rate="100mbit")})
    assert storage_limit_s(slow, 25_000_000) == 1.0
    assert storage_limit_s(slow.model_copy(update={"mode": Mode.BASIC}), 25_000_000) == 2.0
    two = Group(count=2)
    assert storage_limit_s(slow.model_copy(update={"prefill": two, "decode": two}), 25_000_000) == 0.5
    assert storage_limit_s(CLUSTER, 25_000_000) is None


def test_the_demo_tells_both_times_the_limits_and_paths_at_any_width():
    found = demo_summary(
        basic={"job_s": 42.0, "storage_limit_s": 36.0}, job_s=21.0, storage_limit_s=15.0, ttft_s=ZERO
    )
    for width in (80, 120, 200):
        console = Console(width=width, record=True, file=io.StringIO())
        tell(found, None, console)
        lines = console.export_text().splitlines()
        told = next(line for line in lines if line.startswith("job completion time"))
        assert "42.0 s" in told and "21.0 s" in told and "2.00 times as fast" in told
        limit = next(line for line in lines if "limit" in line)
        assert "36.0 s" in limit and "15.0 s" in limit and "2.40 times at best" in limit
        assert next(line for line in lines if line.startswith("path split")).split()[2:4] == ["-", "38"]
        assert max(map(len, lines)) <= width


def test_the_picture_is_drawn_with_and_without_a_limit(tmp_path):
    for limit_s in (None, 6.0):
        picture.draw(demo_summary(storage_limit_s=limit_s), tmp_path / "demo.png")
        assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def status(bytes_read: int, **changes) -> Status:
    def rank(name: str, role: Role, number: int) -> EngineStatus:
        engine = RankInfo(
            engine_id=name,
            role=role,
            rank=number,
            tp_size=2,
            url="http://x",
            fingerprint="f",
            page_size=1,
            page_bytes=1,
        )
        forwarded = bytes_read if role is Role.PREFILL else 0
        return EngineStatus(
            engine=engine, load=Workload(), age_s=0, store_read_bytes=bytes_read, forwarded_bytes=forwarded
        )

    values = dict(
        policy="decode",
        uptime_s=1,
        engines=tuple(rank(n, r, i) for n, r in (("p", Role.PREFILL), ("d", Role.DECODE)) for i in (0, 1)),
        rooms_open=0,
        rooms_closed=1,
        paths={LoadPath.DECODE: bytes_read},
        fallbacks={"peer": 1},
        duplicate_store_pages=0,
        errors=0,
    )
    return Status(**(values | changes))


def test_scheduler_counters_add_ranks_and_leave_out_what_was_before():
    counters = measure.from_scheduler(status(10)).since(measure.from_scheduler(status(4)))
    assert counters.engines["p"] == EngineRead(role="prefill", store_read_bytes=12, forwarded_bytes=12)
    assert counters.engines["d"] == EngineRead(role="decode", store_read_bytes=12, forwarded_bytes=0)
    assert counters.paths == {"decode": 6} and counters.fallbacks == {}


def test_quantiles_are_nearest_ranks():
    assert measure.quantiles([float(n) for n in range(1, 101)]) == Quantiles(p50=51, p99=100, mean=50.5)
    assert measure.quantiles([]) == Quantiles(p50=0, p99=0, mean=0)


def test_each_mode_has_its_cluster():
    assert {name: cluster_config(CLUSTER, name).mode for name in ("basic", "both")} == {
        "basic": Mode.BASIC,
        "both": Mode.BOTH,
    }
    assert cluster_config(CLUSTER, "dualpath") == CLUSTER
    decode = cluster_config(cluster_config(CLUSTER, "basic"), "decode")
    assert (decode.mode, decode.scheduler.policy) == (Mode.DECODE_SIDE, "decode")
    assert {"prefill", "decode", "round_robin", "shorter_queue"} <= set(MODES)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"modes": ("oracel",)}, "mode is 'oracel'; choose from basic, both, dualpath"),
        ({"modes": ()}, "modes are none"),
        ({"modes": ("basic", "basic")}, "name each wanted mode once"),
        ({"out": Path(__file__).parent}, "which is not empty"),
        ({"max_context_tokens": 5000}, "prefill.max_total_tokens is 4096"),
        ({"trace": Path("/absent")}, "/absent: no such file"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(tmp_path, changes, said):
    group = CLUSTER.prefill.model_copy(update={"max_total_tokens": 4096})
    options = EvalOptions(
        trace=None,
        cluster=CLUSTER.model_copy(update={"prefill": group}),
        modes=("basic",),
        agents=1,
        concurrency=1,
        turns=2,
        max_context_tokens=1000,
        seed=1,
        out=tmp_path / "out",
    )
    with pytest.raises(EvalError, match=said):
        evaluate(replace(options, **changes), console=None)
    assert not (tmp_path / "out").exists()


def test_upstream_engines_store_reads_come_from_their_own_metrics():
    registry = CollectorRegistry()
    tokens = Counter("sglang:prefetched_tokens", "as SGLang names it", ["tp_rank"], registry=registry)
    server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        engines = [("prefill-0", "prefill", url)]
        before = measure.from_engines(engines, bytes_per_token=100)
        tokens.labels("0").inc(32)
        tokens.labels("1").inc(32)
        after = measure.from_engines(engines, bytes_per_token=100)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert after.since(before).engines == {
        "prefill-0": EngineRead(role="prefill", store_read_bytes=3200, forwarded_bytes=0)
    }
    assert after.duplicate_store_pages is None
    with pytest.raises(EvalError, match="--enable-metrics"):
        measure.from_engines(engines, bytes_per_token=100)
