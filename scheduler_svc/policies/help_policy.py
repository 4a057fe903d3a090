"""Who may help whom, and how much: relays, decode engines that hold objects, and prefill engines.  Pure, like
the other policies.

**Who.**  Every relay may help every engine, and every decode engine rank that has a rank's objects that rank.
Where there are more than `MOST` of a kind, an engine is given that many neighbours on a ring of hashed names:
engines use different ones, all ranks of an engine the same, and one that joins or leaves changes few lists.

**Share.**  Relays are fair by themselves: they see what each engine has left.  A share keeps one engine
from filling a relay's queue while others wait.  With `q` bytes to be read by an engine and `r` the rate of
its own link, alone it would need

    need = q / r                                seconds; an unknown r is taken to be the mean of the others'
    share = need / sum of all needs             in steps of `STEP`, at least one
    share = 1                                   for an engine with nothing to read: its next load is not known

**Don't.**  An engine that computes for longer than it reads alone gains nothing: its loads hide behind what
is computed meanwhile.  It gets the share 0 while

    ready tokens / compute rate  >=  need + STALE_S

and both rates are known.  Tokens are ready when their request waits for no read.  With fewer of them, a lone
request for instance, each second of a read is a second of its time to first token.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Generic, NamedTuple, Protocol, TypeVar

MOST = 16
"""Of a kind: an engine rank has a thread and bounce memory for each."""
STEP = 1 / 8
"""Finer differences are not worth a message."""
STALE_S = 1.0
"""What engines say is up to a heartbeat old."""


class Reader(NamedTuple):
    """A prefill engine, over all its ranks."""

    engine_id: str
    read_queue_bytes: int
    read_rate_bytes_per_s: float
    """Of its own link; 0 while unknown."""
    ready_tokens: int
    compute_rate_tokens_per_s: float
    """0 while unknown."""


class Help(NamedTuple):
    share: float
    reason: str | None = None
    """Why it is 0."""


HIDES = Help(0.0, "loading hides behind computing")


class _Named(Protocol):
    @property
    def name(self) -> str: ...


Named = TypeVar("Named", bound=_Named)


class Ring(Generic[Named]):
    """Helpers of one kind in the order of their hashes."""

    def __init__(self, helpers: Iterable[Named]) -> None:
        """Each has a name of its own."""
        placed = sorted((_place(helper.name), helper.name, helper) for helper in helpers)
        self._places = [place for place, _, _ in placed]
        self._helpers = [helper for _, _, helper in placed]

    def __len__(self) -> int:
        return len(self._helpers)

    def first(self, engine_id: str) -> int:
        """Where the list of this engine begins; 0 for all while they may have all."""
        return bisect_left(self._places, _place(engine_id)) if len(self._helpers) > MOST else 0

    def from_(self, first: int) -> list[Named]:
        """The list that begins there."""
        count = min(MOST, len(self._helpers))
        return [self._helpers[(first + step) % len(self._helpers)] for step in range(count)]


def _place(name: str) -> bytes:
    return blake2b(name.encode(), digest_size=8).digest()


def help_for(readers: Iterable[Reader]) -> dict[str, Help]:
    """By engine, what it may ask of each of its relays."""
    needs = _needs_s(readers := list(readers))
    hidden = {reader.engine_id for reader in readers if _hides(reader, needs[reader.engine_id])}
    total_s = sum(need for engine_id, need in needs.items() if engine_id not in hidden)
    return {
        engine_id: HIDES if engine_id in hidden else Help(_share(need_s, total_s))
        for engine_id, need_s in needs.items()
    }


def _needs_s(readers: Sequence[Reader]) -> dict[str, float]:
    """Seconds that each would read alone; bytes of a link of 1 B/s while nobody's rate is known."""
    known = [reader.read_rate_bytes_per_s for reader in readers if reader.read_rate_bytes_per_s > 0]
    usual = sum(known) / len(known) if known else 1.0
    return {
        reader.engine_id: reader.read_queue_bytes / (reader.read_rate_bytes_per_s or usual)
        for reader in readers
    }


def _share(need_s: float, total_s: float) -> float:
    if need_s <= 0:
        return 1.0
    return min(1.0, max(1, math.ceil(need_s / total_s / STEP - 1e-9)) * STEP)


def _hides(reader: Reader, need_s: float) -> bool:
    if need_s <= 0 or reader.read_rate_bytes_per_s <= 0 or reader.compute_rate_tokens_per_s <= 0:
        return False
    return reader.ready_tokens / reader.compute_rate_tokens_per_s >= need_s + STALE_S
