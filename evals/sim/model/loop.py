"""The event loop: what happens next, and when."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class EventLoop:
    """Actions in the order of their times; equal times in the order they were asked for.

    Not simpy: a turn is four events whose times are known when they are made, so nothing ever
    waits, and a heap alone costs a third of simpy's time an event (docs/simulator.md).
    """

    __slots__ = ("_heap", "_serial", "now_s", "stopped")

    def __init__(self) -> None:
        self.now_s = 0.0
        self.stopped = False
        """Set it to end `run` after the action at hand."""
        self._heap: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._serial = 0

    def at(self, time_s: float, action: Callable[[Any], None], argument: Any = None) -> None:
        """Call `action(argument)` at `time_s`, which is not in the past."""
        self._serial += 1
        heappush(self._heap, (time_s, self._serial, action, argument))

    def run(self) -> None:
        """Until nothing is left to happen."""
        heap = self._heap
        while heap and not self.stopped:
            self.now_s, _, action, argument = heappop(heap)
            action(argument)
