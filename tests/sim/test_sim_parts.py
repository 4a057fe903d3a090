"""Loop, links, engines' clocks and sizes, each alone."""

from __future__ import annotations

from itertools import pairwise

import pytest

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.common.service_level import capacity
from dualpath_sgl.evals.sim.model.decode import DecodeCosts, DecodeGroup
from dualpath_sgl.evals.sim.model.engines import Request, SimEngine
from dualpath_sgl.evals.sim.model.hardware import Hardware
from dualpath_sgl.evals.sim.model.loop import EventLoop
from dualpath_sgl.evals.sim.model.models import DS_27B, DS_660B, QWEN_32B
from dualpath_sgl.evals.sim.model.prefill import PrefillCosts, PrefillGroup
from dualpath_sgl.evals.sim.model.setup import MODES, Setup
from dualpath_sgl.evals.sim.model.storage import StorageLink
from dualpath_sgl.evals.sim.model.workload import (
    Lengths,
    Turn,
    table2_trajectories,
    trace_trajectories,
    with_appends,
    workload,
)
from dualpath_sgl.evals.sim.studies.online import serve
from scheduler_svc.wire.protocol import RankInfo, Role

PFLOP = 1e15


def test_things_happen_in_the_order_of_their_times_and_equal_ones_as_asked():
    loop, seen = EventLoop(), []
    for time_s, name in ((2.0, "late"), (1.0, "first"), (1.0, "second")):
        loop.at(time_s, seen.append, name)
    loop.run()
    assert seen == ["first", "second", "late"] and loop.now_s == 2.0


def test_a_link_serves_one_read_after_another_and_is_never_idle_with_work():
    link = StorageLink("node", 100.0)
    assert link.ask(200, now_s=0.0) == 2.0
    assert link.ask(100, now_s=1.0) == 3.0
    assert link.queued_bytes == 300
    link.ended(200)
    link.ended(100)
    assert (link.queued_bytes, link.read_bytes) == (0, 300)
    assert link.ask(100, now_s=10.0) == 11.0


@pytest.mark.parametrize(
    ("model", "context_tokens", "paper"),
    [
        (DS_660B, 32_721, 22),
        (DS_660B, 16_384, 13),
        (DS_660B, 65_536, 36),
        (QWEN_32B, 16_384, 117),
        (QWEN_32B, 65_536, 267),
    ],
)
def test_cache_bytes_per_flop_are_the_papers(model, context_tokens, paper):
    """Paper, section 2: GB of KV per PFLOP of computing 429 tokens behind the context."""
    gigabytes = context_tokens * model.kv_bytes_per_token / 1e9
    petaflops = sum(model.prefill_work(429, context_tokens)) / PFLOP
    assert gigabytes / petaflops == pytest.approx(paper, rel=0.06)


def test_kv_bytes_are_the_papers():
    assert DS_660B.kv_bytes_per_token == 656 * 61
    assert QWEN_32B.kv_bytes_per_token == 256 * 1024


def engine(role: Role, name: str, free_tokens: int | None = None) -> SimEngine:
    description = RankInfo(
        engine_id=name, role=role, url=f"http://{name}:1", fingerprint="x", page_size=64, page_bytes=64
    )
    return SimEngine(description, StorageLink(name, 1.0), 64, 1.0, free_tokens)


def request(prefill: SimEngine, decode: SimEngine, *, output=1, attention_s=0.0, experts_s=0.0) -> Request:
    turn = Turn(64, output, 1, 64, 0, attention_s, experts_s)
    return Request(0, 0, turn, 0.0, prefill, decode, 0, 0, 0, attention_s, experts_s)


def test_a_decode_step_lasts_as_long_as_the_largest_batch_of_the_group_needs():
    loop, ended = EventLoop(), {}

    def finished(found: Request) -> None:
        ended[id(found)] = loop.now_s

    first, second = engine(Role.DECODE, "a", 1000), engine(Role.DECODE, "b", 1000)
    group = DecodeGroup(loop, [first, second], DecodeCosts(1.0, 0.5, float("inf")), finished)
    alone, pair_1, pair_2 = (
        request(first, first, output=11),
        request(first, second, output=6),
        request(first, second, output=6),
    )
    for one in (alone, pair_1, pair_2):
        group.prefilled(one)
    loop.run()
    # Batches 1 and 2: five steps of 1 + 2 x 0.5 s; then one sequence: five of 1.5 s.
    assert ended[id(pair_1)] == ended[id(pair_2)] == pytest.approx(10.0)
    assert ended[id(alone)] == pytest.approx(17.5)


def test_a_sequence_waits_until_the_engine_has_memory_for_it():
    loop, ended = EventLoop(), []
    only = engine(Role.DECODE, "a", 64 + 5)
    costs = DecodeCosts(1.0, 0.0, float("inf"))
    group = DecodeGroup(loop, [only], costs, lambda found: ended.append(loop.now_s))
    for _ in range(2):
        group.prefilled(request(only, only, output=5))
    loop.run()
    assert ended == pytest.approx([4.0, 8.0])
    assert only.free_device_tokens == 69


def test_a_prefill_step_waits_for_the_slowest_engine_and_shares_the_experts():
    loop, ended = EventLoop(), []
    engines = [engine(Role.PREFILL, "a"), engine(Role.PREFILL, "b")]
    costs = PrefillCosts(0.1, 10.0, float("inf"), True, 1e9, 64)
    group = PrefillGroup(loop, engines, costs, lambda found: ended.append(loop.now_s))
    group.loaded(request(engines[0], engines[0], attention_s=1.0, experts_s=4.0))
    for attention_s in (3.0, 2.0):  # loaded during the first step: they make the second one
        group.loaded(request(engines[attention_s > 2], engines[0], attention_s=attention_s, experts_s=1.0))
    loop.run()
    assert ended == pytest.approx([0.1 + 1.0 + 2.0] + 2 * [3.1 + 0.1 + 3.0 + 1.0])


def test_without_layerwise_prefill_a_batch_must_fit_the_memory():
    loop, ended = EventLoop(), []
    only = engine(Role.PREFILL, "a")
    costs = PrefillCosts(0.0, 10.0, float("inf"), layerwise=False, kv_bytes=130, page_bytes=64)
    group = PrefillGroup(loop, [only], costs, lambda found: ended.append(loop.now_s))
    for _ in range(4):  # 64 bytes each: the first alone, then two, then one
        group.loaded(request(only, only, attention_s=1.0))
    loop.run()
    assert ended == pytest.approx([1.0, 3.0, 3.0, 4.0])


def test_the_capacity_search_finds_the_rate_within_its_precision():
    asked = []

    def met(rate: float) -> bool:
        asked.append(rate)
        return rate <= 0.73

    assert capacity(met, first=0.2, precision=0.02) == pytest.approx(0.73, rel=0.02)
    assert capacity(met, first=3.0, precision=0.02) == pytest.approx(0.73, rel=0.02)
    assert len(asked) < 30


def test_a_rate_above_what_storage_bears_misses_the_service_level_and_a_low_one_keeps_it():
    hardware = Hardware(gpus_per_node=1)
    agents = workload(table2_trajectories("32k", 1)[:40], 40, DS_27B, hardware, 1)
    setup = Setup(DS_27B, hardware, 1, 1, MODES["basic"])
    hit_bytes_per_agent = agents.hit_bytes / 40
    limit_per_s = hardware.storage_bytes_per_s / hit_bytes_per_agent
    assert serve(setup, agents, 0.1 * limit_per_s, lambda turns: None).met
    verdict = serve(setup, agents, 2 * limit_per_s, lambda turns: None)
    assert not verdict.met and verdict.ttft_s > 4.0


def test_a_growing_trajectory_finds_all_earlier_whole_pages_but_not_the_last_token():
    for lengths in table2_trajectories("32k", 1)[:20]:
        assert lengths[0].hit == 0
        for before, turn in pairwise(lengths):
            assert turn.hit == (before.prompt + before.output - 1) // 64 * 64
            assert turn.prompt > turn.hit


def test_agents_of_a_trace_find_what_the_trace_shares(data_trace):
    found = trace_trajectories(data_trace)
    assert len(found) >= 2
    assert all(turn.hit < turn.prompt and turn.hit % 64 == 0 for lengths in found for turn in lengths)
    hits, prompts = (sum(turn[index] for lengths in found for turn in lengths) for index in (1, 0))
    assert 0.5 < hits / prompts < 1.0


def test_more_agents_than_trajectories_draw_them_again():
    trajectories = table2_trajectories("32k", 1)[:3]
    found = workload(trajectories, 10, DS_27B, Hardware(), 1)
    assert len(found.agents) == 10 and len(set(map(len, found.agents))) <= 3
    assert found.agents[:3] != found.agents[3:6]


def test_a_model_that_leaves_no_memory_is_refused():
    with pytest.raises(EvalError, match=r"ds-660b needs .* on each of 8 prefill engines.*more prefill nodes"):
        Setup(DS_660B, Hardware(), 1, 4, MODES["basic"])


def test_appends_scale_and_a_session_ends_before_its_greatest_length():
    session = (Lengths(1000, 0, 50), Lengths(1150, 1024, 50), Lengths(1300, 1152, 50))
    assert with_appends([session], 1.0, 10_000) == [session]
    (doubled,) = with_appends([session], 2.0, 10_000)
    assert [turn.prompt for turn in doubled] == [1000, 1250, 1500]
    assert [turn.hit for turn in doubled] == [0, 1024, 1280]
    assert with_appends([session], 2.0, 1400) == [doubled[:2]]
