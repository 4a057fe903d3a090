"""Decode engines: admission to GPU memory, the copy into it, and steps that a group makes together.

A step of a group lasts `fixed + sequence_s * largest batch of its engines`.  Between changes of
that batch every sequence gets one token a step, so the group keeps one clock counted in steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

from dualpath_sgl.evals.sim.model.engines import Request, SimEngine
from dualpath_sgl.evals.sim.model.loop import EventLoop


class DecodeCosts(NamedTuple):
    fixed_s: float
    sequence_s: float
    """Each sequence's own part of a step."""
    nic_bytes_per_s: float


class DecodeGroup:
    def __init__(
        self,
        loop: EventLoop,
        engines: Sequence[SimEngine],
        costs: DecodeCosts,
        finished: Callable[[Request], None],
    ) -> None:
        self._loop = loop
        self._costs = costs
        self._finished = finished
        self._running: list[tuple[float, int, Request]] = []
        """Step at which it ends, serial number."""
        self._serial = 0
        self._steps = 0.0
        """Made until `_counted_s`."""
        self._counted_s = 0.0
        self._engines_with = [len(engines)]
        """How many engines have a batch of this size."""
        self._largest = 0
        self._step_s = costs.fixed_s
        self._wake: tuple[float, float] | None = None
        """Step and step time that the next event was computed from."""
        self._version = 0

    def prefilled(self, request: Request) -> None:
        """Its prompt's KV is in the engine's host buffer."""
        request.decode.ready.append(request)
        self._admit(request.decode)

    def _admit(self, engine: SimEngine) -> None:
        """In order, as memory allows; then the KV is copied from the host buffer to the GPU."""
        now_s = self._loop.now_s
        while engine.ready:
            request = engine.ready[0]
            turn = request.turn
            needed = turn.prompt_tokens + turn.output_tokens
            if needed > _free_tokens(engine):
                return
            engine.ready.popleft()
            engine.free_device_tokens = _free_tokens(engine) - needed
            copy_s = (turn.hit_bytes + turn.new_bytes) / self._costs.nic_bytes_per_s
            engine.nic_free_s = max(engine.nic_free_s, now_s) + copy_s
            self._loop.at(engine.nic_free_s, self._begin, request)

    def _begin(self, request: Request) -> None:
        self._count()
        request.decode_begun_s = self._loop.now_s
        self._serial += 1
        # Prefill has made the first token.
        heappush(self._running, (self._steps + request.turn.output_tokens - 1, self._serial, request))
        self._resize(request.decode, 1)
        self._schedule()

    def _resize(self, engine: SimEngine, change: int) -> None:
        sizes = self._engines_with
        sizes[engine.batch] -= 1
        engine.batch += change
        if engine.batch == len(sizes):
            sizes.append(0)
        sizes[engine.batch] += 1
        if engine.batch > self._largest:
            self._largest = engine.batch
        while self._largest and not sizes[self._largest]:
            self._largest -= 1
        self._step_s = self._costs.fixed_s + self._costs.sequence_s * self._largest

    def _count(self) -> None:
        now_s = self._loop.now_s
        self._steps += (now_s - self._counted_s) / self._step_s
        self._counted_s = now_s

    def _schedule(self) -> None:
        """One event for the next sequence to end; an earlier one with another answer is outdated."""
        if not self._running:
            return
        wake = (self._running[0][0], self._step_s)
        if wake != self._wake:
            self._wake = wake
            self._version += 1
            remaining = max(0.0, wake[0] - self._steps)
            self._loop.at(self._loop.now_s + remaining * self._step_s, self._woken, self._version)

    def _woken(self, version: int) -> None:
        if version != self._version:
            return
        self._count()
        self._wake = None
        ended: list[Request] = []
        while self._running and self._running[0][0] <= self._steps + 1e-6:
            request = heappop(self._running)[2]
            engine, turn = request.decode, request.turn
            engine.free_device_tokens = _free_tokens(engine) + turn.prompt_tokens + turn.output_tokens
            self._resize(engine, -1)
            ended.append(request)
        for request in ended:
            self._admit(request.decode)
        self._schedule()
        for request in ended:
            self._finished(request)


def _free_tokens(engine: SimEngine) -> int:
    assert engine.free_device_tokens is not None, "a decode engine has memory"
    return engine.free_device_tokens
