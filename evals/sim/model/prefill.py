"""Prefill engines that compute in steps, all engines of an expert-parallel group together.

A step packs every engine's loaded requests in order until their attention time reaches the quota
(paper, section 6.2); the one that does not fit is cut (chunked prefill).  It lasts

    fixed + slowest engine's attention + all experts' work / engines

because every layer ends with an exchange among the group.  With layerwise prefill a layer's KV
moves while another is computed, so the step lasts at least as long as the slowest engine's NIC
needs:

    in    stored KV to the GPU, on either path
    out   KV to the DE buffer: only what is new for pages read by the DE, everything else otherwise

Without it (the paper's Basic) the batch's KV must fit the GPU and moves before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from dualpath_sgl.evals.sim.model.engines import Request, SimEngine
from dualpath_sgl.evals.sim.model.loop import EventLoop


class PrefillCosts(NamedTuple):
    fixed_s: float
    """Least time of a step."""
    quota_s: float
    nic_bytes_per_s: float
    """Infinite: moves cost nothing (the paper's Oracle)."""
    layerwise: bool
    kv_bytes: float
    """GPU memory for KV; binds without layerwise prefill only."""
    page_bytes: int


class PrefillGroup:
    def __init__(
        self,
        loop: EventLoop,
        engines: Sequence[SimEngine],
        costs: PrefillCosts,
        finished: Callable[[Request], None],
    ) -> None:
        self._loop = loop
        self._engines = engines
        self._costs = costs
        self._finished = finished
        self._is_busy = False
        self.longest_attention_s = 0.0
        self.mean_attention_s = 0.0
        """Summed over steps: their ratio is the paper's attention Max/Avg."""

    def loaded(self, request: Request) -> None:
        """Its stored KV is in a host buffer."""
        request.prefill.ready.append(request)
        if not self._is_busy:
            self._step()

    def _step(self) -> None:
        costs = self._costs
        done: list[Request] = []
        longest_s = total_s = experts_s = 0.0
        longest_move = 0
        for engine in self._engines:
            if engine.ready:
                attention_s, more_experts_s, move = self._pack(engine, done)
                longest_s = max(longest_s, attention_s)
                longest_move = max(longest_move, move)
                total_s += attention_s
                experts_s += more_experts_s
        if not total_s:
            self._is_busy = False
            return
        self._is_busy = True
        compute_s = longest_s + experts_s / len(self._engines)
        move_s = longest_move / costs.nic_bytes_per_s
        step_s = costs.fixed_s + (max(compute_s, move_s) if costs.layerwise else compute_s + move_s)
        self.longest_attention_s += longest_s
        self.mean_attention_s += total_s / len(self._engines)
        self._loop.at(self._loop.now_s + step_s, self._ended, done)

    def _pack(self, engine: SimEngine, done: list[Request]) -> tuple[float, float, int]:
        """One engine's part of a step: attention time, experts' time, bytes its NIC moves."""
        costs, ready = self._costs, engine.ready
        attention_s = experts_s = 0.0
        held_bytes = move_in = move_out = 0
        while ready and attention_s < costs.quota_s:
            request = ready[0]
            turn = request.turn
            prompt_bytes = turn.hit_bytes + turn.new_bytes
            if held_bytes and held_bytes + prompt_bytes > costs.kv_bytes and not costs.layerwise:
                break
            held_bytes += prompt_bytes
            room_s = costs.quota_s - attention_s
            left_s = request.attention_left_s
            if left_s > room_s:
                experts_s += request.experts_left_s * room_s / left_s
                request.experts_left_s *= 1 - room_s / left_s
                request.attention_left_s -= room_s
                attention_s = costs.quota_s
                break
            ready.popleft()
            done.append(request)
            attention_s += left_s
            experts_s += request.experts_left_s
            move_in += turn.hit_bytes
            move_out += prompt_bytes - request.split_page * costs.page_bytes
        move = max(move_in, move_out) if costs.layerwise else move_in + move_out
        return attention_s, experts_s, move

    def _ended(self, done: list[Request]) -> None:
        for request in done:
            self._finished(request)
        self._step()
