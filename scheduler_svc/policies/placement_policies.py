"""Placement policies: which pair of engines serves a request.

A policy is told which engines can be given requests (`EngineWatcher`) and keeps its own index
over them, so that choosing among ten thousand costs no scan.  The rules it goes by are in
`scheduler_svc.policies.placement_rules`; the service and the simulator run the same objects.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple, Protocol
from urllib.parse import urlsplit

from scheduler_svc.ledger.engines import EngineState, EngineWatcher
from scheduler_svc.policies.lazy_heap import LazyHeap
from scheduler_svc.policies.placement_rules import (
    DECODE_RULE_NAMES,
    PREFILL_CLASS_NAMES,
    choose_decode,
    group_key,
    is_worth_staying,
    pair_rate,
    prefill_class,
    prefill_key,
)
from scheduler_svc.wire.protocol import Role

MAX_SESSIONS = 100_000
"""Sessions remembered; the one unused for longest is forgotten first."""

MAX_GROUP_ENGINES = 8
"""DEs of one host beyond this (the paper's node has 8) form another group: phase 2 looks at each DE
of a group."""

DEFAULT_PLACEMENT = "affinity"


class NoEngine(Exception):
    """No live engine of this role."""

    def __init__(self, role: Role) -> None:
        super().__init__(f"no live {role} engine; start one or wait for its heartbeat")


class Choice(NamedTuple):
    prefill: EngineState
    decode: EngineState
    inputs: dict[str, str | int | float]
    """The numbers that led to it and how many engines there were, for spans."""
    prefill_kept_pages: int = 0
    """Pages of the session's earlier turns on the PE, if it has evicted none."""
    decode_kept_pages: int = 0
    """The same on the DE."""


class PlacementPolicy(EngineWatcher, Protocol):
    name: str

    def place(self, session_id: str | None, prompt_tokens: int) -> Choice:
        """Choose a pair.  Raises NoEngine and changes nothing."""


class Members:
    """The engines of one role in a list that can be indexed and left at once."""

    def __init__(self, role: Role) -> None:
        self._role = role
        self._engines: list[EngineState] = []
        self._position: dict[EngineState, int] = {}

    def __len__(self) -> int:
        return len(self._engines)

    def __getitem__(self, index: int) -> EngineState:
        """Raises NoEngine when there is none; `index` may exceed their number."""
        if not self._engines:
            raise NoEngine(self._role)
        return self._engines[index % len(self._engines)]

    def add(self, engine: EngineState) -> None:
        self._position[engine] = len(self._engines)
        self._engines.append(engine)

    def remove(self, engine: EngineState) -> None:
        position, last = self._position.pop(engine), self._engines.pop()
        if last is not engine:
            self._engines[position] = last
            self._position[last] = position


class _Listed:
    """Base of the policies that need no load."""

    def __init__(self) -> None:
        self._members = {role: Members(role) for role in Role}

    def joined(self, engine: EngineState) -> None:
        self._members[engine.role].add(engine)

    def left(self, engine: EngineState) -> None:
        self._members[engine.role].remove(engine)

    def lowered(self, engine: EngineState) -> None:
        pass

    def _choice(self, prefill: EngineState, decode: EngineState) -> Choice:
        return Choice(prefill, decode, {f"{role}.engines": len(self._members[role]) for role in Role})


class RoundRobinPlacement(_Listed):
    """Engines of each role take turns (the paper's reference)."""

    name = "round_robin"

    def __init__(self) -> None:
        super().__init__()
        self._turn = 0

    def place(self, session_id: str | None, prompt_tokens: int) -> Choice:
        prefill, decode = (self._members[role][self._turn] for role in (Role.PREFILL, Role.DECODE))
        self._turn += 1
        return self._choice(prefill, decode)


class RandomPlacement(_Listed):
    """Any engine of each role, all equally likely."""

    name = "random"

    def __init__(self, rng: random.Random | None = None) -> None:
        super().__init__()
        self._rng = rng or random.Random()

    def place(self, session_id: str | None, prompt_tokens: int) -> Choice:
        turns = (self._rng.getrandbits(32) for _ in Role)
        prefill, decode = (
            self._members[role][turn] for role, turn in zip((Role.PREFILL, Role.DECODE), turns, strict=True)
        )
        return self._choice(prefill, decode)


class DecodeGroup:
    """DEs among which phase 2 balances: those of one host (the paper's node), at most 8."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.engines: list[EngineState] = []

    def key(self) -> float:
        return group_key(self.engines)


class PaperPlacement:
    """The paper's algorithm (section 6.1): PE classes, then DE groups, then a DE of the group."""

    name = "paper"

    def __init__(self) -> None:
        self._prefill: LazyHeap[EngineState] = LazyHeap(prefill_key)
        self._groups: LazyHeap[DecodeGroup] = LazyHeap(DecodeGroup.key)
        self._group_of: dict[EngineState, DecodeGroup] = {}
        self._open_groups: dict[str, list[DecodeGroup]] = {}
        """Groups by host."""

    def joined(self, engine: EngineState) -> None:
        if engine.role is Role.PREFILL:
            self._prefill.add(engine)
            return
        host = urlsplit(engine.leader.url).hostname or ""
        groups = self._open_groups.setdefault(host, [])
        group = next((group for group in groups if len(group.engines) < MAX_GROUP_ENGINES), None)
        if group is None:
            group = DecodeGroup(host)
            groups.append(group)
        self._group_of[engine] = group
        group.engines.append(engine)
        if group in self._groups:
            self._groups.lowered(group)
        else:
            self._groups.add(group)

    def left(self, engine: EngineState) -> None:
        if engine.role is Role.PREFILL:
            self._prefill.remove(engine)
            return
        group = self._group_of.pop(engine)
        group.engines.remove(engine)
        if group.engines:
            self._groups.lowered(group)
            return
        self._groups.remove(group)
        self._open_groups[group.host].remove(group)
        if not self._open_groups[group.host]:
            del self._open_groups[group.host]

    def lowered(self, engine: EngineState) -> None:
        if engine.role is Role.PREFILL:
            self._prefill.lowered(engine)
        else:
            self._groups.lowered(self._group_of[engine])

    def holds(self, engine: EngineState) -> bool:
        """Whether `engine` can be given requests."""
        return engine in self._prefill or engine in self._group_of

    def place(self, session_id: str | None, prompt_tokens: int) -> Choice:
        prefill = self._prefill.least()
        if prefill is None:
            raise NoEngine(Role.PREFILL)
        group = self._groups.least()
        if group is None:
            raise NoEngine(Role.DECODE)
        chosen = choose_decode(prompt_tokens, group.engines)
        inputs: dict[str, str | int | float] = {
            "prefill.engines": len(self._prefill),
            "prefill.class": PREFILL_CLASS_NAMES[prefill_class(prefill)],
            "decode.engines": len(self._group_of),
            "decode.groups": len(self._groups),
            "decode.group_engines": len(group.engines),
            "decode.rule": DECODE_RULE_NAMES[chosen.rule],
            "decode.limit_tokens": chosen.limit_tokens,
        }
        return Choice(prefill, group.engines[chosen.position], inputs)


class _Session(NamedTuple):
    prefill: EngineState
    decode: EngineState
    prompt_tokens: int


class AffinityPlacement:
    """The paper's algorithm, but a session stays where its pages are while that saves time.

    Both engines of a session's last turn still hold its pages in their host pools: on the PE they
    need not be loaded at all, on the DE they are forwarded without a storage read.
    """

    name = "affinity"

    def __init__(self, max_sessions: int = MAX_SESSIONS) -> None:
        self._paper = PaperPlacement()
        self._max_sessions = max_sessions
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        self.joined = self._paper.joined
        self.left = self._paper.left
        self.lowered = self._paper.lowered

    def place(self, session_id: str | None, prompt_tokens: int) -> Choice:
        choice = self._paper.place(session_id, prompt_tokens)
        if session_id is None:
            return choice
        last = self._sessions.get(session_id)
        if last is not None:
            rate = pair_rate(choice.prefill, choice.decode)
            prefill, prefill_pages = self._stay(last.prefill, choice.prefill, rate, last, prompt_tokens)
            decode, decode_pages = self._stay(last.decode, choice.decode, rate, last, prompt_tokens)
            choice.inputs["prefill.saved_bytes"] = expected_bytes(prefill, prefill_pages)
            choice.inputs["decode.saved_bytes"] = expected_bytes(decode, decode_pages)
            choice = Choice(prefill, decode, choice.inputs, prefill_pages, decode_pages)
        self._sessions[session_id] = _Session(choice.prefill, choice.decode, prompt_tokens)
        self._sessions.move_to_end(session_id)
        if len(self._sessions) > self._max_sessions:
            self._sessions.popitem(last=False)
        return choice

    def _stay(
        self,
        last: EngineState,
        best: EngineState,
        rate_bytes_per_s: float,
        session: _Session,
        prompt_tokens: int,
    ) -> tuple[EngineState, int]:
        """The engine to take, and the session's pages on it if none was evicted."""
        if not self._paper.holds(last):
            return best, 0
        pages = min(session.prompt_tokens, prompt_tokens) // last.page_size
        if last is best or is_worth_staying(last, best, expected_bytes(last, pages), rate_bytes_per_s):
            return last, pages
        return best, 0


def expected_bytes(engine: EngineState, pages: int) -> int:
    """Bytes of an earlier turn's `pages` that `engine` may be expected to have kept."""
    return int(pages * engine.page_bytes * engine.kept.share)


PLACEMENT_POLICIES: dict[str, Callable[[], PlacementPolicy]] = {
    policy.name: policy
    for policy in (AffinityPlacement, PaperPlacement, RoundRobinPlacement, RandomPlacement)
}


def placement_policy(name: str) -> PlacementPolicy:
    """A fresh policy.  Raises ValueError naming the known ones."""
    if name not in PLACEMENT_POLICIES:
        raise ValueError(f"placement {name!r} is unknown; choose one of {', '.join(PLACEMENT_POLICIES)}")
    return PLACEMENT_POLICIES[name]()
