"""What a DE has to do: its requests from their arrival to their last token (the paper's seq_e and tok_e).

Until SGLang admits a request it is `DecodeSide`'s.  Behind that nothing tells when it ends (it may be
aborted in any of SGLang's queues), so SGLang's own lists are looked through, a few times a second on
SGLang's scheduler thread.  A request admitted in between is added by itself: a heartbeat must count
every request that was reported before it (scheduler_svc/ledger/placed_work.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import chain
from typing import TYPE_CHECKING

from dualpath_sgl.control.real_request import is_real

if TYPE_CHECKING:
    from sglang.srt.disaggregation.decode import DecodePreallocQueue
    from sglang.srt.managers.schedule_batch import Req

COUNT_INTERVAL_S = 0.25
"""A quarter of a heartbeat's; a thousand requests take about 0.2 ms."""


class DecodeWork:
    """Everything but `with_queued` is called on SGLang's scheduler thread."""

    def __init__(self, left: Callable[[], None]) -> None:
        """`left` is called when requests have ended."""
        self._left = left
        self._queue: DecodePreallocQueue | None = None
        self._next_count_s = 0.0
        self._entries = 0
        """In SGLang's lists at the last count."""
        self._tokens: dict[str, int] = {}
        """Prompt tokens by request id."""

    def follow(self, queue: DecodePreallocQueue) -> None:
        """From now on count what passes through `queue` and its scheduler."""
        self._queue = queue

    def admitted(self, req: Req) -> None:
        """SGLang has just taken it."""
        self._tokens[req.rid] = len(req.origin_input_ids)

    def count(self) -> None:
        """Called once per scheduler iteration; looks when requests came or went, or a count is due."""
        if self._queue is None:
            return
        now_s, entries = time.monotonic(), sum(map(len, _lists(self._queue)))
        if entries == self._entries and now_s < self._next_count_s:
            return
        self._next_count_s, self._entries = now_s + COUNT_INTERVAL_S, entries
        before = self._tokens
        self._tokens = {
            req.rid: len(req.origin_input_ids) for req in _unfinished(self._queue) if is_real(req)
        }
        if before.keys() - self._tokens.keys():
            self._left()

    def with_queued(self, queued: Mapping[str, int]) -> tuple[int, int]:
        """Requests and their prompt tokens; from any thread.

        `queued`: prompt tokens of requests not admitted yet, by id, as of no later than this call.
        One that has been admitted since is counted once.
        """
        tokens = {**queued, **self._tokens}
        return len(tokens), sum(tokens.values())


def _lists(queue: DecodePreallocQueue) -> tuple[list, ...]:
    """Where requests are between the queue and their last token; the first two are of `DecodeRequest`.

    The batch in flight is the running one in a DE's loops (event_loop_overlap_disagg_decode).
    """
    scheduler = queue.scheduler
    return (
        queue.queue,
        queue.transfer_queue.queue,
        queue.retracted_queue,
        queue.held_rebootstrap_reqs,
        scheduler.waiting_queue,
        scheduler.running_batch.reqs,
    )


def _unfinished(queue: DecodePreallocQueue) -> list[Req]:
    """Every request between the queue and its last token, in any order."""
    preallocating, transferring, *rest = _lists(queue)
    connecting = chain(preallocating, transferring)
    requests = chain((decode_req.req for decode_req in connecting), *rest)
    return [req for req in requests if not req.finished()]
