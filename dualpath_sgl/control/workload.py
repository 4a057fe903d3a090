"""How busy this rank is, as its heartbeats tell the scheduler."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from dualpath_sgl.lanes.loads import Loads
from dualpath_sgl.lanes.store_lane import StoreLane
from dualpath_sgl.pools.integrity import PoolCheck
from dualpath_sgl.threads import faults
from scheduler_svc.wire.protocol import Workload


class Work(NamedTuple):
    """Requests that this rank has not finished with."""

    sequences: int
    tokens: int
    """In their prompts."""
    queued_tokens: int = 0
    """In the prompts of those that have no device memory reserved yet."""


class Side(Protocol):
    @property
    def held(self) -> int: ...

    def work_at_hand(self) -> Work: ...


class RankWorkload:
    def __init__(
        self, *, side: Side, store_lane: StoreLane, loads: Loads, pool: Any, pool_check: PoolCheck
    ) -> None:
        self._side = side
        self._store_lane = store_lane
        self._loads = loads
        self._pool = pool
        self._pool_check = pool_check
        self.device_free_tokens = 0
        """As of SGLang's last scheduler iteration (an idle one makes at least one a second)."""

    def now(self) -> Workload:
        """From any thread."""
        work = self._side.work_at_hand()
        return Workload(
            sequences=work.sequences,
            tokens=work.tokens,
            device_free_tokens=max(0, self.device_free_tokens - work.queued_tokens),
            read_queue_bytes=max(0, self._store_lane.queue_bytes),
            read_rate_bytes_per_s=self._store_lane.rate_bytes_per_s,
            unplanned_read_bytes=self._loads.unplanned_read_bytes,
            host_free_pages=self._pool.available_size() // self._pool.page_size,
            held=self._side.held + len(self._loads.open),
            pool_checks=self._pool_check.checks,
            kept_pages=self._pool_check.kept_pages,
            faults=faults.count(),
        )
