"""The loads of this rank: how one begins, and how much is read outside of any plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from dualpath_sgl.lanes.open_loads import OpenLoads
from dualpath_sgl.lanes.page_load import PageLoad
from dualpath_sgl.lanes.store_lane import StoreLane

if TYPE_CHECKING:
    from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import (
        HybridCacheController,
        PrefetchOperation,
    )


class Loads:
    """Safe from any thread."""

    def __init__(
        self, store_lane: StoreLane, page_bytes: int, on_unplanned: Callable[[PageLoad], None] | None = None
    ) -> None:
        """`on_unplanned`: a load without a plan of its own has ended; called on the store lane's thread."""
        self._store_lane = store_lane
        self._on_unplanned = on_unplanned
        self._page_bytes = page_bytes
        self.open = OpenLoads()
        self.unplanned_read_bytes = 0

    def begin(
        self,
        controller: HybridCacheController,
        operation: PrefetchOperation,
        *,
        on_prefix: Callable[[PageLoad, int], None] | None = None,
        on_lanes_done: Callable[[PageLoad], None] | None = None,
        hold: Callable[[PageLoad], None] | None = None,
    ) -> PageLoad:
        """A load of `operation`, open; whoever submits its pages calls `close_part` after the last."""
        return PageLoad(
            controller,
            operation,
            open_loads=self.open,
            page_bytes=self._page_bytes,
            on_prefix=on_prefix,
            on_lanes_done=on_lanes_done,
            hold=hold,
        )

    def read_unplanned(self, controller: HybridCacheController, operation: PrefetchOperation) -> None:
        """Read an operation without a plan of its own from the store, as upstream does."""
        load = self.begin(controller, operation, on_lanes_done=self._count_unplanned)
        self._store_lane.submit(load, 0, load.pages)
        load.close_part()

    def _count_unplanned(self, load: PageLoad) -> None:
        self.unplanned_read_bytes += sum(work.bytes for work in load.lane_work)
        if self._on_unplanned is not None:
            self._on_unplanned(load)
