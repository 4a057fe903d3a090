"""The next call begins before the present one is over, so that no link idles between two.

SGLang's I/O thread stays as it is: it asks for one call (STORAGE_BATCH_SIZE pages) after another, operation by
operation, counts what came and acknowledges.  While it waits for a call, the next one is under way already: of
the same operation, or the first one of the operation behind it.  So acknowledgements are SGLang's own, the same
number in the same order on every rank, and whatever is decided here shows in nothing but time.

An operation's memory is SGLang's again after its last acknowledgement.  A call that has begun and is not asked
for, because the operation was terminated or has fallen short, is given up and waited for before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

from dualpath_sgl.relay.client.prefetch.call import Call, making
from dualpath_sgl.threads import faults

if TYPE_CHECKING:
    import torch
    from sglang.srt.managers.cache_controller import HiCacheController, PrefetchOperation

CALLS = 2
"""Under way at a time; with more, loads get slower one by one and no link is busier."""
LOOK_S = 0.005
"""Between two looks for an operation that has come meanwhile."""


class Read(Protocol):
    """SGLang's own method for one call: pages that came, from the first one on."""

    def __call__(
        self,
        operation: PrefetchOperation,
        hashes: Sequence[str],
        host_indices: torch.Tensor,
        extra_info: Any,
        kv_derived_transfers: Sequence[Any],
        /,
    ) -> int: ...


@dataclass(eq=False)
class _Begun:
    """A call under way, or over."""

    operation: PrefetchOperation
    hashes: Sequence[str]
    end: int | None
    """Index in the operation of the first page behind it; None when it is not of those that SGLang makes one
    after another."""
    prefix_keys: list[str] | None
    """Of the call behind it."""
    call: Call
    over: threading.Event = field(default_factory=threading.Event)
    pages: int = 0
    error: BaseException | None = None

    def result(self) -> int:
        if self.error is not None:
            raise self.error
        return self.pages


class CallsAhead:
    """Of one I/O thread of SGLang's, on which all of it is called."""

    def __init__(self, controller: HiCacheController, call_of: Callable[[PrefetchOperation], Call]) -> None:
        """`call_of`: what is known of an operation, on whichever thread."""
        self._controller = controller
        self._call_of = call_of
        self._ahead: _Begun | None = None
        self._last: _Begun | None = None
        """Asked for last."""
        self._looks_ahead = True
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        for number in range(CALLS):
            threading.Thread(target=self._work, name=f"dualpath-call {number}", daemon=True).start()

    def ask(
        self,
        read: Read,
        operation: PrefetchOperation,
        hashes: Sequence[str],
        host_indices: torch.Tensor,
        extra_info: Any,
        kv_derived_transfers: Sequence[Any],
    ) -> int:
        """What `read` returns or raises for these; meanwhile the next call has begun."""
        begun, self._ahead = self._ahead, None
        if begun is not None and (begun.operation is not operation or begun.hashes != hashes):
            self._give_up(begun)
            begun = None
        if begun is None:
            arguments = (operation, hashes, host_indices, extra_info, kv_derived_transfers)
            begun = self._begin(read, arguments, self._end_of(operation, hashes))
        self._last = begun
        while True:
            if self._ahead is None and self._looks_ahead:
                self._look_ahead(read, begun)
            if begun.over.wait(LOOK_S):
                return begun.result()

    def end(self, operation: PrefetchOperation) -> None:
        """Nothing more is asked for of it: when it has returned, nothing writes into its memory."""
        if self._ahead is not None and self._ahead.operation is operation:
            self._give_up(self._ahead)
            self._ahead = None
        self._last = None

    def close(self) -> None:
        """As `end`, of any operation."""
        if self._ahead is not None:
            self._give_up(self._ahead)
        for _ in range(CALLS):
            self._tasks.put(None)

    @staticmethod
    def _give_up(begun: _Begun) -> None:
        begun.call.given_up = True
        begun.over.wait()

    # -- what comes next ---------------------------------------------------------------------------

    def _end_of(self, operation: PrefetchOperation, hashes: Sequence[str]) -> int | None:
        """Of a call that SGLang asks for now."""
        last = self._last
        first = last.end if last is not None and last.operation is operation else 0
        if first is None or operation.hash_value[first : first + len(hashes)] != hashes:
            return None
        return first + len(hashes)

    def _look_ahead(self, read: Read, present: _Begun) -> None:
        try:
            operation: PrefetchOperation | None = present.operation
            first, prefix_keys = present.end, present.prefix_keys
            assert operation is not None
            if first is None or first >= len(operation.hash_value) or operation.is_terminated():
                operation, first = self._behind(), 0
                if operation is None or operation.is_terminated() or not operation.hash_value:
                    return
                prefix_keys = operation.prefix_keys
            self._ahead = self._begin(read, *self._call(operation, first, prefix_keys))
        except Exception:
            self._looks_ahead = False
            faults.record("one call of SGLang's prefetch waits for the other from now on")

    def _behind(self) -> PrefetchOperation | None:
        """The operation that SGLang takes up next, if it has one."""
        waiting = self._controller.prefetch_buffer
        with waiting.mutex:
            return waiting.queue[0] if waiting.queue else None

    def _call(
        self, operation: PrefetchOperation, first: int, prefix_keys: list[str] | None
    ) -> tuple[tuple[Any, ...], int]:
        """Arguments and end of the operation's call that begins with page `first`, as SGLang will make it."""
        from sglang.srt.managers.cache_controller import STORAGE_BATCH_SIZE
        from sglang.srt.mem_cache.hicache_storage import HiCacheStorageExtraInfo, PoolName

        hashes = operation.hash_value[first : first + STORAGE_BATCH_SIZE]
        end, page_tokens = first + len(hashes), self._controller.page_size
        transfers = getattr(operation, "pool_transfers", None) or []
        return (
            operation,
            hashes,
            operation.host_indices[first * page_tokens : end * page_tokens],
            HiCacheStorageExtraInfo(prefix_keys=prefix_keys),
            [transfer for transfer in transfers if transfer.indices_from_pool == PoolName.KV],
        ), end

    # -- under way ---------------------------------------------------------------------------------

    def _begin(self, read: Read, arguments: tuple[Any, ...], end: int | None) -> _Begun:
        operation, hashes, _, extra_info, _ = arguments
        keys = extra_info.prefix_keys
        prefix_keys = keys + hashes if keys is not None else None
        begun = _Begun(operation, hashes, end, prefix_keys, self._call_of(operation))
        self._tasks.put(partial(self._make, begun, read, arguments))
        return begun

    @staticmethod
    def _make(begun: _Begun, read: Read, arguments: tuple[Any, ...]) -> None:
        try:
            with making(begun.call):
                begun.pages = read(*arguments)
        except BaseException as error:
            begun.error = error
        finally:
            begun.over.set()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
