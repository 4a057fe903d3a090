"""Placement policies: which pair of engines serves a request."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple, Protocol

MAX_SESSIONS = 100_000
"""Sessions remembered; the one unused for longest is forgotten first."""


class Pair(NamedTuple):
    prefill_id: str
    decode_id: str


class PlacementPolicy(Protocol):
    name: str

    def place(self, session_id: str | None, prefill_ids: Sequence[str], decode_ids: Sequence[str]) -> Pair:
        """Choose one of each.  Both sequences are non-empty and hold live engines only."""


class RoundRobinPlacement:
    """Engines of each role take turns; a session stays with its pair while that lives.

    Sticking matters because both engines still hold the pages of the session's last turn.
    """

    name = "round_robin"

    def __init__(self, max_sessions: int = MAX_SESSIONS) -> None:
        self._max_sessions = max_sessions
        self._sessions: OrderedDict[str, Pair] = OrderedDict()
        self._prefill_turn = 0
        self._decode_turn = 0

    def place(self, session_id: str | None, prefill_ids: Sequence[str], decode_ids: Sequence[str]) -> Pair:
        last = self._sessions.get(session_id) if session_id is not None else None
        pair = Pair(
            last.prefill_id if last and last.prefill_id in prefill_ids else self._next_prefill(prefill_ids),
            last.decode_id if last and last.decode_id in decode_ids else self._next_decode(decode_ids),
        )
        if session_id is not None:
            self._sessions[session_id] = pair
            self._sessions.move_to_end(session_id)
            if len(self._sessions) > self._max_sessions:
                self._sessions.popitem(last=False)
        return pair

    def _next_prefill(self, ids: Sequence[str]) -> str:
        self._prefill_turn += 1
        return ids[(self._prefill_turn - 1) % len(ids)]

    def _next_decode(self, ids: Sequence[str]) -> str:
        self._decode_turn += 1
        return ids[(self._decode_turn - 1) % len(ids)]
