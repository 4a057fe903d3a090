"""The compute quota of a prefill step, on SGLang's own class that fills steps."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dualpath_sgl.experimental import attention_quota
from dualpath_sgl.experimental.attention_quota import AttentionTime, Quota, quota_adder
from dualpath_sgl.launch.setup.tiny_model import TinyModel, build
from dualpath_sgl.start.config import Settings

PAGE = 16
CHUNK_TOKENS = 1024
TIME = AttentionTime(ms_per_square=0.001)
"""100 tokens alone take 10 ms."""


@pytest.fixture(scope="module")
def step() -> Iterator:
    """Begins a step of an engine with empty caches: `step(quota)`; None is SGLang as it is."""
    from sglang.srt.managers.schedule_policy import PrefillAdder
    from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.radix_cache import RadixCache
    from sglang.srt.runtime_context import create_context, use_context
    from sglang.srt.server_args import ServerArgs

    arguments = ServerArgs(model_path=str(build(TinyModel())), device="cpu", page_size=PAGE)
    pool = PagedTokenToKVPoolAllocator(8192, PAGE, torch.float32, "cpu", None, False)
    tree = RadixCache(CacheInitParams(False, None, pool, PAGE))

    def begin(quota_ms: float | None):
        adder = PrefillAdder if quota_ms is None else quota_adder(PrefillAdder, Quota(TIME, quota_ms))
        return adder(PAGE, tree, pool, None, 1.0, 8192, CHUNK_TOKENS)

    begin.tree = tree
    with use_context(create_context(arguments, role="scheduler")):
        yield begin


@pytest.fixture
def request_of(step):
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    def make(tokens: int) -> Req:
        sampling = SamplingParams(max_new_tokens=1)
        made = Req(f"{tokens} tokens", "", array("q", range(tokens)), sampling)
        made.init_next_round_input(step.tree)
        return made

    return make


def fill(adder, requests: list) -> list[int]:
    """As SGLang's scheduler does; how many tokens of each request the step takes."""
    from sglang.srt.managers.schedule_policy import AddReqResult

    for one in requests:
        if adder.budget_state() is AddReqResult.OTHER:
            break
        if adder.add_one_req(one, False, None) is not AddReqResult.CONTINUE:
            break
    return [one.extend_end - one.prefix_len for one in adder.can_run_list]


@given(
    cached=st.integers(0, 200_000),
    ms=st.floats(0.01, 10_000),
    per_square=st.floats(1e-9, 1e-3),
)
def test_the_tokens_within_a_time_are_the_most_that_fit(cached, ms, per_square):
    time = AttentionTime(per_square)
    tokens = time.tokens_within(cached, ms)
    slack = 1 + 1e-6
    assert time.of(cached, tokens) <= ms * slack
    assert time.of(cached, tokens + 1) * slack > ms


def test_attention_to_a_prefix_costs_what_the_longer_prompt_costs_more():
    assert TIME.of(0, 1000) + TIME.of(1000, 500) == pytest.approx(TIME.of(0, 1500))


def test_requests_are_taken_in_order_until_the_quota_is_full_and_the_next_is_cut(step, request_of):
    adder = step(60.0)
    assert fill(adder, [request_of(160) for _ in range(4)]) == [160, 160, 80]  # 25.6 + 25.6 + 6.4 ms
    assert adder.new_chunked_req is adder.can_run_list[-1]
    assert adder.rem_chunk_tokens == CHUNK_TOKENS - 400, "SGLang's own bound counts on"


def test_a_request_of_which_not_even_a_page_fits_waits_for_the_next_step(step, request_of):
    adder = step(25.7)
    assert fill(adder, [request_of(160), request_of(160)]) == [160]
    assert adder.new_chunked_req is None


def test_a_step_always_takes_a_page(step, request_of):
    assert fill(step(1e-6), [request_of(160), request_of(160)]) == [PAGE]


def test_a_quota_that_is_never_full_changes_nothing(step, request_of):
    prompts = (700, 200, 400)
    plain, bounded = step(None), step(1e9)
    taken = fill(plain, [request_of(tokens) for tokens in prompts])
    assert fill(bounded, [request_of(tokens) for tokens in prompts]) == taken
    assert taken[-1] < prompts[-1], "cut by token count"
    assert bounded.rem_chunk_tokens == plain.rem_chunk_tokens


def test_a_long_prompt_is_computed_in_steps_that_shrink_as_its_prefix_grows(step, request_of):
    quota_ms, prompt = 40.0, request_of(900)
    adder = step(quota_ms)
    chunks = fill(adder, [prompt])
    while prompt.extend_end < 900:
        prompt.prefix_len = prompt.extend_end
        adder = step(quota_ms)
        unfinished = adder.add_chunked_req(prompt)
        assert unfinished is (prompt if prompt.extend_end < 900 else None)
        chunks.append(prompt.extend_end - prompt.prefix_len)
        assert fill(adder, [request_of(160)])[1:] == [] or unfinished is None, "only one request is cut"
    assert sum(chunks) == 900
    assert chunks[:-1] == sorted(chunks[:-1], reverse=True)
    assert all(chunk % PAGE == 0 for chunk in chunks[:-1])
    done = 0
    for chunk in chunks:
        assert TIME.of(done, chunk) <= quota_ms
        done += chunk


def test_an_engine_that_cuts_no_prompts_refuses_a_quota_and_says_what_to_do(step, monkeypatch):
    from sglang.srt.runtime_context import get_context

    get_context().override("test", disaggregation_mode="prefill")
    monkeypatch.setattr(attention_quota, "settings", lambda: Settings(attention_quota_ms=300))
    with pytest.raises(RuntimeError, match="QUOTA_MS is 300.*--chunked-prefill-size"):
        attention_quota.after_init_chunk_sizer(None, SimpleNamespace(chunked_prefill_size=None))


def test_without_a_quota_sglangs_class_stays():
    assert attention_quota.after_get_prefill_adder_class(dict, None) is dict
