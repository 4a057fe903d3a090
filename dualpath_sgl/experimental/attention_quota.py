"""Experimental: the compute quota of a prefill step (paper section 6, A.4) bounds its attention's time.

SGLang fills a step by token count (`--chunked-prefill-size`), however long the cached prefixes are that
the new tokens attend to.  With a quota a step takes requests in SGLang's order while their predicted
attention time fits, and the request that does not fit is cut to a chunk that does.  The token count
stays as a second bound.

Off unless `DUALPATH_ATTENTION_QUOTA_MS` is set, because an engine then measures its model once, at its
start, with SGLang's own profiler.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from dualpath_sgl.start.config import settings

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.schedule_policy import PrefillAdder

logger = logging.getLogger(__name__)


class AttentionTime(NamedTuple):
    """The square term of a prompt's prefill time on one engine, which is what attention takes."""

    ms_per_square: float
    """`a` of `f(l) = a * l^2 + b * l + c`, the milliseconds in which `l` tokens are computed."""

    def of(self, cached: int, new: int) -> float:
        """Milliseconds in which `new` tokens attend to `cached` ones and to each other."""
        return self.ms_per_square * new * (2 * cached + new)

    def tokens_within(self, cached: int, ms: float) -> int:
        """The most new tokens whose attention takes `ms` at most (the paper's binary search, solved)."""
        return math.floor(math.sqrt(cached * cached + max(ms, 0.0) / self.ms_per_square)) - cached


class Quota(NamedTuple):
    """What the attention of every step of one engine may take."""

    time: AttentionTime
    ms: float


_quota: Quota | None = None
"""What binds this process's engine; None: the token count alone bounds a step."""


def after_init_chunk_sizer(_result: None, scheduler: Any) -> None:
    """Measure the model once it is loaded, before the first request.

    Raises RuntimeError when the engine cannot cut prompts.
    """
    global _quota
    from sglang.srt.runtime_context import get_disagg

    ms = settings().attention_quota_ms
    if ms is None or get_disagg().disaggregation_mode != "prefill":
        return
    if scheduler.chunked_prefill_size is None:
        raise RuntimeError(
            f"DUALPATH_ATTENTION_QUOTA_MS is {ms:g}, but this engine does not cut prompts: give it "
            "--chunked-prefill-size, or unset the quota"
        )
    time = _measure(scheduler)
    if time is None:
        logger.error("DualPath: no attention quota: SGLang could not profile the model (see above)")
        return
    _quota = Quota(time, ms)
    logger.info(
        "DualPath: a step's attention takes %g ms at most: %d new tokens, or %d after 32768 cached ones",
        ms,
        time.tokens_within(0, ms),
        time.tokens_within(32768, ms),
    )


def _measure(scheduler: Any) -> AttentionTime | None:
    """By SGLang's profiler for pipeline-parallel engines; all ranks get the first one's figures."""
    from sglang.srt.managers.scheduler_components.dynamic_chunk_sizer import DynamicChunkSizer

    sizer = scheduler.dynamic_chunk_sizer
    if sizer is None:
        runner = _WithinVocabulary(scheduler.tp_worker.model_runner, scheduler.model_config.vocab_size)
        sizer = DynamicChunkSizer(
            model_runner=runner,
            model_config=scheduler.model_config,
            tree_cache=scheduler.tree_cache,
            req_to_token_pool=scheduler.req_to_token_pool,
            token_to_kv_pool_allocator=scheduler.token_to_kv_pool_allocator,
            spec_algorithm=scheduler.spec_algorithm,
            chunked_prefill_size=scheduler.chunked_prefill_size,
            max_prefill_tokens=scheduler.max_prefill_tokens,
            page_size=scheduler.page_size,
            device=scheduler.device,
        )
        if not sizer.profile_and_fit():
            return None
    return AttentionTime(sizer.predictor.quadratic_coeff_a)


class _WithinVocabulary:
    """A model runner for the profiler, which draws token ids below 10,000 whatever the model knows."""

    def __init__(self, runner: Any, vocabulary_size: int) -> None:
        self._runner = runner
        self._vocabulary_size = vocabulary_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def forward(self, forward_batch: Any, **kwargs: Any) -> Any:
        forward_batch.input_ids.remainder_(self._vocabulary_size)
        return self._runner.forward(forward_batch=forward_batch, **kwargs)


def after_get_prefill_adder_class(adder: Any, _scheduler: Any) -> type[PrefillAdder]:
    return adder if _quota is None else quota_adder(adder, _quota)


@cache
def quota_adder(base: Any, quota: Quota) -> type[PrefillAdder]:
    """SGLang's class that fills one step, bounded by `quota` too."""
    from sglang.srt.managers.schedule_policy import AddReqResult

    class AttentionQuotaAdder(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._attention_left_ms = quota.ms

        def budget_state(self) -> AddReqResult:
            state = super().budget_state()
            is_spent = self._attention_left_ms <= 0
            return AddReqResult.OTHER if is_spent and state is AddReqResult.CONTINUE else state

        def add_one_req(
            self, req: Req, has_chunked_req: bool, truncation_align_size: int | None
        ) -> AddReqResult:
            cached = req.prefix_len + req.host_hit_length
            with self._within_quota(req, cached, truncation_align_size or self.page_size) as fits:
                if not fits:
                    return AddReqResult.OTHER
                return super().add_one_req(req, has_chunked_req, truncation_align_size)

        def add_chunked_req(self, req: Req) -> Req | None:
            with self._within_quota(req, req.prefix_len, self.page_size):
                return super().add_chunked_req(req)

        @contextmanager
        def _within_quota(self, req: Req, cached: int, unit: int) -> Iterator[bool]:
            """Lend SGLang only as many of the step's tokens as the quota allows this request.

            A prompt is cut at whole `unit`s; yields False when not even one fits.  The first request of a
            step always gets one: a prefix whose quota is smaller would wait for ever.
            """
            new = len(req.full_untruncated_fill_ids) - cached
            allowed = quota.time.tokens_within(cached, self._attention_left_ms)
            withheld = 0
            if allowed < new:
                allowed = max(allowed // unit * unit, 0 if self.can_run_list else unit)
                withheld = max(self.rem_chunk_tokens - allowed, 0)
            taken_before = len(self.can_run_list)
            self.rem_chunk_tokens -= withheld
            try:
                yield allowed > 0
            finally:
                self.rem_chunk_tokens += withheld
                if len(self.can_run_list) > taken_before:
                    # Only one request of a step may be cut.
                    spent = quota.time.of(req.prefix_len, req.extend_end - req.prefix_len)
                    self._attention_left_ms = 0.0 if withheld else self._attention_left_ms - spent

    return AttentionQuotaAdder
