"""Work an engine was given that its heartbeats do not show yet.

Heartbeats do not tell of arrivals.  Without this count every request placed between two of them
would go to the engine that was idle at the last one, and after the next one to another: all
engines would swing between idle and overloaded.  So a placed request counts at once,

    placed ── report of the engine's leader rank ──> arrived ── its next heartbeat ──> counted there
       └── `PLACED_TTL_S` without a report: the router gave up, or the engine refused ──> dropped

and leaves with the first heartbeat that was made after the engine had it (one connection
carries both in order, so the next heartbeat received is one).  A Done in between changes
nothing: it ends the request's load, not the request.
"""

from __future__ import annotations

PLACED_TTL_S = 10.0
"""Longer than a router takes to hand a request on."""


class PlacedWork:
    """One per engine.  `len` is the number of requests."""

    __slots__ = ("_arrived", "_rooms", "tokens")

    def __init__(self) -> None:
        self.tokens = 0
        """Prompt tokens of all of them."""
        self._rooms: dict[int, tuple[int, float]] = {}
        """Tokens and time of placement by room, oldest first."""
        self._arrived: set[int] = set()

    def __len__(self) -> int:
        return len(self._rooms)

    def placed(self, room: int, tokens: int, now_s: float) -> None:
        self._rooms[room] = (tokens, now_s)
        self.tokens += tokens

    def arrived(self, room: int, tokens: int, now_s: float) -> None:
        """The leader rank reported `room`, placed here or by someone else; it has `tokens` exactly."""
        before, placed_s = self._rooms.get(room, (0, now_s))
        self._rooms[room] = (tokens, placed_s)
        self.tokens += tokens - before
        self._arrived.add(room)

    def counted(self, now_s: float) -> None:
        """A heartbeat of the leader rank came: it counts whatever had arrived."""
        for room in self._arrived:
            self._drop(room)
        self._arrived.clear()
        overdue = []
        for room, (_, placed_s) in self._rooms.items():
            if now_s - placed_s <= PLACED_TTL_S:
                break
            overdue.append(room)
        for room in overdue:
            self._drop(room)

    def _drop(self, room: int) -> None:
        self.tokens -= self._rooms.pop(room)[0]

    def __repr__(self) -> str:
        return f"PlacedWork({self.tokens}, {self._rooms}, {sorted(self._arrived)})"
