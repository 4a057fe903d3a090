"""SGLang's own prefetch I/O thread over a loader: a load in the calls that SGLang makes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from queue import Queue
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

import torch
from sglang.srt.managers.cache_controller import HiCacheController, PrefetchOperation

from dualpath_sgl.cpu_profile.plugin import activate

activate()


class Prefetch(HiCacheController):  # type: ignore[misc]
    """A controller of which nothing is there but what its I/O thread uses; a page is one token."""

    def __init__(self, read: Callable[[Sequence[int]], int]) -> None:
        """`read`: bring these pages; how many came, from the first one on."""
        self._read = read
        self.page_size = 1
        self.storage_backend = SimpleNamespace(calls_may_overlap=True)
        self.storage_stop_event = threading.Event()
        self.prefetch_buffer: Queue[Any] = Queue()
        self.prefetch_sync_queue: Queue[Any] = Queue()

    def page_get_func(
        self, _operation: Any, hashes: list[str], _host_indices: torch.Tensor, _extra_info: Any
    ) -> int:
        return self._read([int(page) for page in hashes])

    def load(self, page_count: int) -> int:
        """As one operation; pages that SGLang counts."""
        thread = threading.Thread(target=self.prefetch_io_aux_func)
        thread.start()
        operation = PrefetchOperation("request", [])
        operation.hash_value = [str(page) for page in range(page_count)]
        operation.host_indices = torch.arange(page_count)
        self.prefetch_buffer.put(operation)
        came = 0
        while not (ack := self.prefetch_sync_queue.get()).completed_req:
            came = ack.completed_tokens
        self.storage_stop_event.set()
        self.prefetch_buffer.put(None)
        thread.join()
        return came
