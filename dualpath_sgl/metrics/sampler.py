"""A thread that writes down, once a second, what has no moment of its own: gauges, and counts kept elsewhere.

It does not hang on the channel to the scheduler: that one's absence is among what it tells.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from dualpath_sgl.metrics.rank import RankMetrics
from dualpath_sgl.threads import faults
from scheduler_svc.wire.protocol import Workload

if TYPE_CHECKING:
    from dualpath_sgl.relay.client.counts import Counts
    from dualpath_sgl.relay.resident.server import Served

INTERVAL_S = 1.0


class Sampler(threading.Thread):
    def __init__(
        self,
        metrics: RankMetrics,
        *,
        workload: Callable[[], Workload],
        connected: Callable[[], bool],
        counts: Callable[[], Counts | None],
        served: Callable[[], Served | None] = lambda: None,
        arrived: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        """All are called on its thread.

        `connected`: the scheduler has accepted this rank.  `counts`: those of the relay client, `served`: those of
        a decode engine that is asked by key; None without one.  `arrived`: bytes by lane so far, where DualPath's
        lanes load.
        """
        super().__init__(name="dualpath-metrics", daemon=True)
        self._metrics = metrics
        self._workload = workload
        self._connected = connected
        self._counts = counts
        self._served = served
        self._arrived = arrived
        self._faults = 0
        self._stopping = threading.Event()

    def run(self) -> None:
        sample = faults.guarded(self.sample)
        sample()
        while not self._stopping.wait(INTERVAL_S):
            sample()

    def stop(self) -> None:
        self._stopping.set()
        self.join()

    def sample(self) -> None:
        self._metrics.connected.set(int(self._connected()))
        self._metrics.now(self._workload())
        if (counts := self._counts()) is not None:
            self._metrics.helpers.now(counts)
        self._metrics.links(self._arrived(), counts)
        if (served := self._served()) is not None:
            self._metrics.helpers.served(served)
        now = faults.count()
        self._metrics.faults.inc(now - self._faults)
        self._faults = now
