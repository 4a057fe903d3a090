"""How several ranks agree on the pages that landed (tp_size > 1), and on when to stop.

SGLang reduces one acknowledgement after another, so every rank must produce the same number in
the same order.  Two lanes cannot promise that: here each prefetch operation has a ticket, the
same on every rank because operations enter the I/O thread in the same order, and what is reduced
is the progress of every ticket that all ranks hold.

Whatever decides what the next round reduces, and whether there is one, comes out of a round, hence
is the same everywhere: up to which ticket all ranks have admitted, which tickets are over, and
whether all ranks were told to stop.  A rank takes part while it has an operation in flight *or was
told to stop*, and all leave in the same round.  So one that is ahead waits in the collective for the
others to take up the same operation, or the same stop; none is left in it alone.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sglang.srt.managers.cache_controller import PrefetchAck
    from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import (
        HybridCacheController,
        PrefetchOperation,
    )

ROUND_S = 0.002


def meet() -> None:
    """Wait for this engine's other ranks, which come here too, all on SGLang's scheduler thread.

    What a rank did before may have taken it long.  What follows must begin on all of them at about the
    same time: SGLang gives its storage threads 10 s to stop, and acknowledgement threads stop together.
    """
    from sglang.srt.runtime_context import get_parallel

    torch.distributed.barrier(group=get_parallel().attn_tp_group.cpu_group)


class _InFlight:
    """An operation between its admission and the round that ends it."""

    def __init__(self, operation: PrefetchOperation) -> None:
        self.operation = operation
        self.landed_tokens = 0
        """On this rank."""
        self.announced_tokens = 0
        """What SGLang's scheduler was told."""
        self.is_finished = False
        """On this rank."""


class RankSync:
    def __init__(self) -> None:
        self._in_flight: dict[int, _InFlight] = {}
        """By ticket, in order."""
        self._by_operation: dict[int, _InFlight] = {}
        """The same by id(operation)."""
        self._next_ticket = 0
        self._shared_end = 0
        """Every rank has admitted all tickets before this one."""
        self._is_open = True
        self._lock = threading.Lock()
        """Over what `admit` and `open` change."""

    def open(self) -> None:
        """Called on the I/O thread when it starts, before anything is admitted."""
        with self._lock:
            self._is_open = True

    def admit(self, operation: PrefetchOperation) -> None:
        """Called on the I/O thread for every operation, before any page of it is read.

        Once the ranks have agreed to stop, SGLang drops what is left: so does this.
        """
        with self._lock:
            if self._is_open:
                entry = _InFlight(operation)
                self._in_flight[self._next_ticket] = self._by_operation[id(operation)] = entry
                self._next_ticket += 1

    def run(self, controller: HybridCacheController) -> None:
        """Replaces SGLang's acknowledgement thread until storage stops on every rank."""
        while True:
            is_stopping = controller.storage_stop_event.is_set()
            self._collect(controller)
            if (is_stopping or self._in_flight) and self._round(controller, is_stopping):
                break
            time.sleep(ROUND_S)
        with self._lock:
            self._in_flight.clear()
            self._by_operation.clear()
            self._next_ticket = self._shared_end = 0
            self._is_open = False

    def _collect(self, controller: HybridCacheController) -> None:
        """Acknowledgements of operations that are no longer in flight belong to nobody."""
        while not controller.prefetch_sync_queue.empty():
            ack: PrefetchAck | None = controller.prefetch_sync_queue.get()
            if ack is None or (entry := self._by_operation.get(id(ack.operation))) is None:
                continue
            if ack.completed_tokens is not None:
                entry.landed_tokens = ack.completed_tokens
            if ack.completed_req:
                entry.is_finished = True

    def _round(self, controller: HybridCacheController, is_stopping: bool) -> bool:
        """Whether every rank was told to stop."""
        with self._lock:
            next_ticket = self._next_ticket
            shared = {t: entry for t, entry in self._in_flight.items() if t < self._shared_end}
        state = torch.tensor(
            [
                int(is_stopping),
                next_ticket,
                *(entry.landed_tokens for entry in shared.values()),
                *(int(entry.is_finished) for entry in shared.values()),
            ]
        )
        controller._all_reduce(
            state, torch.distributed.ReduceOp.MIN, controller.prefetch_completion_sync_groups
        )
        all_stop, self._shared_end, *progress = state.tolist()
        for (ticket, entry), tokens, is_over in zip(
            shared.items(), progress[: len(shared)], progress[len(shared) :], strict=True
        ):
            self._announce(controller, entry, tokens, bool(is_over))
            if is_over:
                with self._lock:
                    del self._in_flight[ticket]
                    del self._by_operation[id(entry.operation)]
        return bool(all_stop)

    @staticmethod
    def _announce(controller: HybridCacheController, entry: _InFlight, tokens: int, is_over: bool) -> None:
        from sglang.srt.managers.cache_controller import PrefetchAck

        operation = entry.operation
        if tokens > entry.announced_tokens:
            entry.announced_tokens = tokens
            controller.ack_prefetch_queue.put(
                PrefetchAck(rid=operation.request_id, operation=operation, completed_tokens=tokens)
            )
        if is_over:
            controller.ack_prefetch_queue.put(
                PrefetchAck(rid=operation.request_id, operation=operation, completed_req=True)
            )
