"""The storage NIC of one node, shared by its engines.

First come, first served and work-conserving: with everything a request reads asked for at once,
the end of a read is known when it is asked for.  (Processor sharing has the same throughput and
longer mean waits; the paper does not say which its client does.)  The store behind the links is never the
bottleneck, as in the paper.
"""

from __future__ import annotations

from dualpath_sgl.evals.common.imbalance import max_over_mean
from dualpath_sgl.evals.sim.model.loop import EventLoop


class StorageLink:
    __slots__ = ("_free_s", "bytes_per_s", "name", "queued_bytes", "read_bytes", "window_bytes")

    def __init__(self, name: str, bytes_per_s: float) -> None:
        self.name = name
        self.bytes_per_s = bytes_per_s
        self.queued_bytes = 0
        """Asked for and not read yet."""
        self.read_bytes = 0
        self.window_bytes = 0
        """Read since `take_window`."""
        self._free_s = 0.0

    def ask(self, bytes_: int, now_s: float) -> float:
        """Queue a read; returns when it ends.  `ended` must be called then."""
        self.queued_bytes += bytes_
        begin_s = self._free_s if self._free_s > now_s else now_s
        self._free_s = begin_s + bytes_ / self.bytes_per_s
        return self._free_s

    def ended(self, bytes_: int) -> None:
        self.queued_bytes -= bytes_
        self.read_bytes += bytes_
        self.window_bytes += bytes_

    def take_window(self) -> int:
        bytes_, self.window_bytes = self.window_bytes, 0
        return bytes_


WINDOW_S = 60.0
"""Over which the load of the links is compared; the paper gives no interval."""


class Balance:
    """Maximum over mean of the links' traffic (the paper's SNIC Max/Avg), window by window."""

    def __init__(self, loop: EventLoop, links: list[StorageLink]) -> None:
        self._loop = loop
        self._links = links
        self.ratios: list[float] = []
        self.is_open = True
        loop.at(WINDOW_S, self._window)

    def _window(self, _) -> None:
        if not self.is_open:
            return
        read = [link.take_window() for link in self._links]
        if any(read):
            self.ratios.append(max_over_mean(read))
        self._loop.at(self._loop.now_s + WINDOW_S, self._window)
