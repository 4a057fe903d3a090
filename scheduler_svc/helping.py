"""Prefill engines that others can help are told by whom: on connecting, and when that changes."""

from __future__ import annotations

from typing import NamedTuple

from scheduler_svc.ledger.engines import EngineState, EngineTable, RankKey
from scheduler_svc.ledger.relays import RelayTable
from scheduler_svc.policies.help_policy import Help, Reader, Ring, help_for
from scheduler_svc.wire.protocol import (
    LEADER_RANK,
    Helper,
    Helpers,
    Mode,
    RankInfo,
    RelayInfo,
    Resident,
)

PERIOD_S = 0.5
"""Between two looks at shares."""
SOON_S = 0.05
"""Between two looks when somebody who helps came or went, or engines connected."""


SETTLE_S = 3.0
"""After its start the scheduler tells nobody anything for so long: relays and engines come back to a restarted
one within a second or two, and until it knows them all again the engines' last lists are better than its own."""

ALL = Help(1.0)
"""Where there is no relay to be shared."""


class HelpTold(NamedTuple):
    """What prefill engines have been told of relays, counted."""

    helped: int = 0
    hidden: int = 0
    """Their loads hide behind computing."""
    alone: int = 0
    """In mode relay, and there is none."""


class Helping:
    """Single-threaded."""

    def __init__(self, engines: EngineTable, relays: RelayTable, started_s: float) -> None:
        self._settled_s = started_s + SETTLE_S
        self._engines = engines
        self._relays = relays
        self._changes = (0, 0)
        """Of relays and of objects, that the rings were made of."""
        self._ring: Ring[RelayInfo] = Ring(())
        self._residents: dict[str, Ring[Resident]] = {}
        """By name of objects."""
        self._lists: dict[tuple[int, Help, str | None, int], Helpers] = {}
        """By places on the rings: equal lists are one object, made and encoded once."""
        self._told: dict[RankKey, Helpers] = {}
        self._news: set[str] = set()
        """Engines of which a rank has connected since the last look."""
        self._looked_s = float("-inf")
        self.told = HelpTold()

    @property
    def residents(self) -> int:
        """Decode engine ranks that are told of."""
        return sum(map(len, self._residents.values()))

    def heard(self, info: RankInfo, is_new: bool) -> None:
        """A rank lives.  `is_new`: on another connection, and it may have missed what was told it."""
        key = RankKey(info.engine_id, info.rank)
        if is_new:
            self._told.pop(key, None)
        if key not in self._told:
            self._news.add(info.engine_id)

    def gone(self, key: RankKey) -> None:
        self._told.pop(key, None)

    def due(self, now_s: float) -> list[tuple[RankKey, Helpers]]:
        """What ranks are to be told now."""
        if now_s < self._settled_s:
            return []
        changes = self._relays.changes, self._engines.object_changes
        is_soon = changes != self._changes or bool(self._news)
        if now_s - self._looked_s < (SOON_S if is_soon else PERIOD_S):
            return []
        self._looked_s = now_s
        news, self._news = self._news, set()
        # Without relays there are no shares: what was told stays true until somebody comes or goes.
        is_the_same = changes == self._changes and not self._ring
        if changes != self._changes:
            self._look_around(changes)
        engines = self._engines.helped()
        helps = help_for(map(_reader, engines)) if self._ring else {}
        self.told = self._count(engines, helps)
        due: list[tuple[RankKey, Helpers]] = []
        for engine in engines:
            if is_the_same and engine.engine_id not in news:
                continue
            help_ = helps.get(engine.engine_id, ALL)
            for rank, state in engine.ranks.items():
                key = RankKey(engine.engine_id, rank)
                helpers = self._helpers(engine.engine_id, help_, state.info.objects)
                if self._told.get(key) != helpers:
                    self._told[key] = helpers
                    due.append((key, helpers))
        return due

    def in_words(self, engine_id: str) -> str:
        """What an engine has been told."""
        told = self._told.get(RankKey(engine_id, LEADER_RANK), Helpers())
        relays = f"{len(told.relays)} relays" + (f", not asked: {told.reason}" if told.reason else "")
        return relays + (f"; {len(told.residents)} decode engines by key" if told.residents else "")

    def _look_around(self, changes: tuple[int, int]) -> None:
        self._changes = changes
        self._ring = Ring(self._relays.serving())
        self._residents = {objects: Ring(found) for objects, found in self._engines.residents().items()}
        self._lists.clear()

    def _count(self, engines: list[EngineState], helps: dict[str, Help]) -> HelpTold:
        if not self._ring:
            return HelpTold(alone=sum(engine.mode is Mode.RELAY for engine in engines))
        hidden = sum(help_.reason is not None for help_ in helps.values())
        return HelpTold(len(engines) - hidden, hidden)

    def _helpers(self, engine_id: str, help_: Help, objects: str | None) -> Helpers:
        first = self._ring.first(engine_id)
        holding = self._residents.get(objects) if objects is not None else None
        first_holding = holding.first(engine_id) if holding is not None else 0
        at = first, help_, objects, first_holding
        helpers = self._lists.get(at)
        if helpers is None:
            relays = self._ring.from_(first)
            helpers = self._lists[at] = Helpers(
                tuple(Helper(relay.name, relay.endpoint, help_.share) for relay in relays),
                help_.reason if relays else None,
                tuple(holding.from_(first_holding)) if holding is not None else (),
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
