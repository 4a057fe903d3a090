"""How several ranks agree on the pages that landed (tp_size > 1).

SGLang reduces one acknowledgement after another, so every rank must produce the same number in
the same order.  Two lanes cannot promise that: here each prefetch operation has a ticket, the
same on every rank because operations enter the I/O thread in the same order, and what is reduced
is the progress of every ticket in flight.  A round takes place while any operation is in flight;
an operation is retired by a round's result, hence in the same round on every rank, so ranks
always agree on whether another round follows (one that is ahead waits in the collective for the
others to take up the same operation).
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import (
        HybridCacheController,
        PrefetchOperation,
    )

TICKETS = 1024
"""Operations in flight at most; SGLang's own rate limit keeps far below."""
ROUND_S = 0.002


class RankSync:
    def __init__(self) -> None:
        self._in_flight: dict[int, PrefetchOperation] = {}
        self._tickets: dict[int, int] = {}
        """id(operation) -> ticket."""
        self._next_ticket = 0
        self._lock = threading.Lock()

    def admit(self, operation: PrefetchOperation) -> None:
        """Called on the I/O thread for every operation, before any page of it is read."""
        with self._lock:
            self._in_flight[self._next_ticket] = operation
            self._tickets[id(operation)] = self._next_ticket
            self._next_ticket += 1

    def run(self, controller: HybridCacheController) -> None:
        """Replaces SGLang's acknowledgement thread until storage stops."""
        progress: dict[int, int] = {}
        """Ticket -> tokens that landed on this rank."""
        finished: set[int] = set()
        announced: dict[int, int] = {}
        """Ticket -> tokens that SGLang's scheduler was told of."""
        while not controller.storage_stop_event.is_set():
            self._collect(controller, progress, finished)
            with self._lock:
                in_flight = dict(self._in_flight)
            if in_flight:
                self._round(controller, in_flight, progress, finished, announced)
            time.sleep(ROUND_S)

    def _collect(
        self, controller: HybridCacheController, progress: dict[int, int], finished: set[int]
    ) -> None:
        while not controller.prefetch_sync_queue.empty():
            ack = controller.prefetch_sync_queue.get()
            ticket = self._tickets.get(id(ack.operation)) if ack is not None else None
            if ticket is None:
                continue
            if ack.completed_tokens is not None:
                progress[ticket] = ack.completed_tokens
            if ack.completed_req:
                finished.add(ticket)

    def _round(
        self,
        controller: HybridCacheController,
        in_flight: dict[int, PrefetchOperation],
        progress: dict[int, int],
        finished: set[int],
        announced: dict[int, int],
    ) -> None:
        from sglang.srt.managers.cache_controller import PrefetchAck

        state = torch.zeros(2, TICKETS, dtype=torch.int64)
        for ticket in in_flight:
            state[0, ticket % TICKETS] = progress.get(ticket, 0)
            state[1, ticket % TICKETS] = int(ticket in finished)
        controller._all_reduce(
            state, torch.distributed.ReduceOp.MIN, controller.prefetch_completion_sync_groups
        )
        tokens, ended = state.tolist()
        for ticket, operation in in_flight.items():
            slot = ticket % TICKETS
            rid = operation.request_id
            if tokens[slot] > announced.get(ticket, 0):
                announced[ticket] = tokens[slot]
                controller.ack_prefetch_queue.put(
                    PrefetchAck(rid=rid, operation=operation, completed_tokens=tokens[slot])
                )
            if ended[slot]:
                controller.ack_prefetch_queue.put(
                    PrefetchAck(rid=rid, operation=operation, completed_req=True)
                )
                self._retire(ticket, operation)
                progress.pop(ticket, None)
                announced.pop(ticket, None)
                finished.discard(ticket)

    def _retire(self, ticket: int, operation: PrefetchOperation) -> None:
        with self._lock:
            del self._in_flight[ticket]
            del self._tickets[id(operation)]
