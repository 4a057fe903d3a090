"""Requests for a placement, while messages of engines wait: short of CPU, plans come first.

A plan that comes too late forwards nothing; a router that gets no placement places by itself.  So a placement
waits until the socket is empty, or has its small share of a burst, and after `PATIENCE_S` the router is told
that the scheduler is busy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from scheduler_svc.wire.protocol import Place

PATIENCE_S = 0.1
"""A placement decides for seconds of a request; it is not worth more."""
MOST = 10_000
"""Some MiB; a busy scheduler makes as many placements in a second."""

Peer = TypeVar("Peer")


class WaitingPlaces(Generic[Peer]):
    """In the order of their arrival.  `answer` decides one, `refuse` says that there is no time for it."""

    def __init__(self, answer: Callable[[Peer, Place], None], refuse: Callable[[Peer, Place], None]) -> None:
        self._answer = answer
        self._refuse = refuse
        self._waiting: deque[tuple[Peer, Place, float]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, peer: Peer, place: Place, now_s: float) -> None:
        if len(self._waiting) < MOST:
            self._waiting.append((peer, place, now_s))
        else:
            self._refuse(peer, place)

    def take_one(self, now_s: float) -> None:
        """Raises IndexError when none waits."""
        peer, place, came_s = self._waiting.popleft()
        if now_s - came_s > PATIENCE_S:
            self._refuse(peer, place)
        else:
            self._answer(peer, place)
