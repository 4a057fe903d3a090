"""Prefill engines in relay mode are told who may help them: on connecting, and when that changes."""

from __future__ import annotations

from typing import NamedTuple

from scheduler_svc.ledger.engines import EngineState, EngineTable, RankKey
from scheduler_svc.ledger.relays import RelayTable
from scheduler_svc.policies.help_policy import Help, Reader, Ring, help_for
from scheduler_svc.wire.protocol import LEADER_RANK, Helper, Helpers

PERIOD_S = 0.5
"""Between two looks at shares."""
SOON_S = 0.05
"""Between two looks when relays came or went, or engines connected."""


SETTLE_S = 3.0
"""After its start the scheduler tells nobody anything for so long: relays come back to a restarted one within a
second or two, and until it knows them all again the engines' last lists are better than its own."""


class HelpTold(NamedTuple):
    """What prefill engines in relay mode have been told, counted."""

    helped: int = 0
    hidden: int = 0
    """Their loads hide behind computing."""
    alone: int = 0
    """There is no relay."""


class Helping:
    """Single-threaded."""

    def __init__(self, engines: EngineTable, relays: RelayTable, started_s: float) -> None:
        self._settled_s = started_s + SETTLE_S
        self._engines = engines
        self._relays = relays
        self._ring = Ring(())
        self._ring_of = 0
        """`RelayTable.changes` that the ring was made of."""
        self._lists: dict[tuple[int, Help], Helpers] = {}
        """By place on the ring: equal lists are one object, made and encoded once."""
        self._told: dict[RankKey, Helpers] = {}
        self._is_news = False
        """A rank has connected since the last look."""
        self._looked_s = float("-inf")
        self.told = HelpTold()

    def connected(self, key: RankKey) -> None:
        """The rank has a new connection: it may have missed what was told it."""
        self._told.pop(key, None)
        self._is_news = True

    def gone(self, key: RankKey) -> None:
        self._told.pop(key, None)

    def due(self, now_s: float) -> list[tuple[RankKey, Helpers]]:
        """What ranks are to be told now."""
        if now_s < self._settled_s:
            return []
        changed = self._relays.changes != self._ring_of
        if now_s - self._looked_s < (SOON_S if changed or self._is_news else PERIOD_S):
            return []
        self._looked_s, self._is_news = now_s, False
        if changed:
            self._ring, self._ring_of = Ring(self._relays.serving()), self._relays.changes
            self._lists.clear()
        engines = self._engines.asking_relays()
        helps = help_for(_reader(engine) for engine in engines)
        due: list[tuple[RankKey, Helpers]] = []
        counts = [0, 0, 0]
        for engine in engines:
            helpers = self._helpers(engine.engine_id, helps[engine.engine_id])
            counts[2 if not helpers.relays else 1 if helpers.reason else 0] += 1
            for rank in engine.ranks:
                key = RankKey(engine.engine_id, rank)
                if self._told.get(key) != helpers:
                    self._told[key] = helpers
                    due.append((key, helpers))
        self.told = HelpTold(*counts)
        return due

    def in_words(self, engine_id: str) -> str:
        """What an engine has been told."""
        told = self._told.get(RankKey(engine_id, LEADER_RANK), Helpers())
        return f"{len(told.relays)} relays" + (f", not asked: {told.reason}" if told.reason else "")

    def _helpers(self, engine_id: str, help_: Help) -> Helpers:
        first = self._ring.first(engine_id)
        helpers = self._lists.get((first, help_))
        if helpers is None:
            relays = self._ring.from_(first)
            helpers = self._lists[first, help_] = Helpers(
                tuple(Helper(relay.name, relay.endpoint, help_.share) for relay in relays),
                help_.reason if relays else None,
            )
        return helpers


def _reader(engine: EngineState) -> Reader:
    loads = [rank.load for rank in engine.ranks.values()]
    return Reader(
        engine.engine_id,
        engine.read_queue_bytes,
        engine.read_rate_bytes_per_s,
        max(load.ready_tokens for load in loads),
        max(load.compute_rate_tokens_per_s for load in loads),
    )
