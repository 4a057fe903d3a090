"""A load: a list of objects that lanes claim from, until each has landed or failed.

An object is *open*, then *claimed* by one lane, then *landed* (its result is known), or it comes back.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dualpath_sgl.relay import wire
from dualpath_sgl.relay.client.spans import OWN

LEAST_BATCH_BYTES = 256 * 1024
"""Towards the end of a load batches shrink to this: what is left then takes all lanes about as long."""
ANYBODY = ""
"""Part of the list that belongs to no helper."""

NOTHING: deque[int] = deque()

Pointers = int | Sequence[int]
"""Address of an object's bytes, or of each of the blocks that they are cut into."""


class Blocks(NamedTuple):
    """Where one object goes."""

    addresses: Sequence[int]
    sizes: Sequence[int]

    @property
    def byte_count(self) -> int:
        return sum(self.sizes)


def blocks_of(pointers: Pointers, sizes: Pointers) -> Blocks:
    if isinstance(pointers, Sequence):
        assert isinstance(sizes, Sequence)
        return Blocks(pointers, sizes)
    assert not isinstance(sizes, Sequence)
    return Blocks((int(pointers),), (int(sizes),))


class Limits(NamedTuple):
    """Of one claim."""

    batch_bytes: int
    """Wanted; one object may be larger."""
    most_bytes: int
    """An object larger than this is the own client's."""
    lanes: int
    """Claiming from this load, the own client too."""


@dataclass(eq=False)
class Claim:
    relay: str
    indices: list[int]
    byte_count: int
    since_s: float
    void: bool = False
    """Taken back by the load: what comes of it is not wanted."""


class Load:
    """Any thread may call anything."""

    def __init__(
        self,
        keys: Sequence[str],
        destinations: Sequence[Blocks],
        helper_of: Sequence[str] | None = None,
        holders: Collection[str] = (),
    ) -> None:
        """`helper_of`: who shall bring each object, or `ANYBODY`; None when that holds for all.

        `holders`: those of them that hold it, and share it with nobody.
        """
        self.keys = keys
        self.destinations = destinations
        self.sizes = [blocks.byte_count for blocks in destinations]
        self.results: list[int] = [-1] * len(keys)
        self._left_bytes = sum(self.sizes)
        self._undone = len(keys)
        self.landed_s = time.monotonic()
        """When something landed last, whoever brought it."""
        self.brought: dict[str, int] = {}
        """Bytes by relay, and by `OWN`."""
        self.came_back = 0
        """Objects that a relay had claimed and did not bring."""
        self._parts: dict[str, deque[int]] = {}
        for index in range(len(keys)):
            part = helper_of[index] if helper_of is not None else ANYBODY
            self._parts.setdefault(part, deque()).append(index)
        self._reserved = frozenset(holders)
        self._returned: deque[int] = deque()
        self._own: deque[int] = deque()
        """For the own client alone."""
        self._claims: set[Claim] = set()
        self._landing = 0
        self._closed = False
        self._change = threading.Condition()

    @property
    def left_bytes(self) -> int:
        """Of open objects."""
        return self._left_bytes

    @property
    def reserved(self) -> frozenset[str]:
        """Holders whose part nobody else may have."""
        return self._reserved

    def reserve_only(self, holders: Collection[str]) -> bool:
        """What belongs to others than these holders is anybody's from now on; whether that is news."""
        with self._change:
            freed = self._reserved.difference(holders)
            self._reserved -= freed
            return any(self._parts.get(holder) for holder in freed)

    def claim(self, relay: str, limits: Limits) -> Claim | None:
        """The next batch for a relay, from the front; None when nothing is open for it."""
        with self._change:
            return self._claimed(relay, self._take(relay, limits))

    def claim_held(self, holder: str, limits: Limits) -> Claim | None:
        """The next batch of what a decode engine holds, from the front; None when nothing of it is open."""
        with self._change:
            return self._claimed(holder, self._take(holder, limits, only_held=True))

    def _claimed(self, helper: str, indices: list[int]) -> Claim | None:
        if not indices:
            return None
        claim = Claim(helper, indices, sum(self.sizes[i] for i in indices), time.monotonic())
        self._claims.add(claim)
        return claim

    def claim_own(self, limits: Limits, only_leftovers: bool) -> list[int]:
        """The next batch for the own client, from the back.

        `only_leftovers`: of objects that relays shall read it takes what they do not bring.
        """
        with self._change:
            return self._take(None, limits, only_leftovers=only_leftovers)

    def begin_landing(self, claim: Claim) -> bool:
        """Whether its bytes may be written to their destinations; then `land` must follow."""
        with self._change:
            if self._closed or claim.void:
                return False
            self._claims.discard(claim)
            self._landing += 1
            return True

    def land(self, claim: Claim, whole: Sequence[int], not_held: Sequence[int] = ()) -> None:
        """The objects `whole` of the claim have been written.

        Anybody may bring those that were `not_held`; the own client is asked for the others.
        """
        with self._change:
            self._landing -= 1
            for index in whole:
                self.results[index] = self.sizes[index]
            self._undone -= len(whole)
            self._count(claim.relay, sum(self.sizes[index] for index in whole))
            if whole:
                self.landed_s = time.monotonic()
            missing = set(claim.indices).difference(whole)
            self.came_back += len(missing)
            self._reopen(self._own, sorted(missing.difference(not_held)))
            self._reopen(self._returned, not_held)

    def land_own(self, indices: Sequence[int], results: Sequence[int]) -> None:
        """What the own client says is the last word."""
        with self._change:
            for index, result in zip(indices, results, strict=True):
                self.results[index] = result
            self._undone -= len(indices)
            self._count(OWN, sum(result for result in results if result > 0))
            self.landed_s = time.monotonic()
            self._change.notify_all()

    def give_back(self, claim: Claim, to_own: bool = False) -> bool:
        """Nothing of it came: any lane may have it, or the own client alone.

        False when it was taken back already.
        """
        with self._change:
            if claim.void or self._closed or claim not in self._claims:
                return False
            self._claims.discard(claim)
            self._reopen(self._own if to_own else self._returned, claim.indices)
            if not to_own:
                self.came_back += len(claim.indices)
            return True

    def take_back_overdue(self, before_s: float) -> int:
        """Claims from before that time are void, and their objects the own client's; how many objects."""
        with self._change:
            overdue = [claim for claim in self._claims if claim.since_s < before_s]
            for claim in overdue:
                claim.void = True
                self._claims.discard(claim)
                self._reopen(self._own, claim.indices)
            count = sum(len(claim.indices) for claim in overdue)
            self.came_back += count
            return count

    def wait(self, timeout_s: float) -> bool:
        """Until something has changed; False when every object has its result."""
        with self._change:
            if self._undone:
                self._change.wait(timeout_s)
            return self._undone > 0

    def close(self) -> None:
        """When it has returned, no lane writes to a destination any more."""
        with self._change:
            self._closed = True
            while self._landing:
                self._change.wait()

    def _count(self, who: str, byte_count: int) -> None:
        self.brought[who] = self.brought.get(who, 0) + byte_count

    def _reopen(self, whose: deque[int], indices: Sequence[int]) -> None:
        whose.extend(indices)
        self._left_bytes += sum(self.sizes[i] for i in indices)
        self._change.notify_all()

    def _take(
        self, relay: str | None, limits: Limits, *, only_leftovers: bool = False, only_held: bool = False
    ) -> list[int]:
        if self._closed and relay is not None:
            return []
        wanted = max(LEAST_BATCH_BYTES, min(limits.batch_bytes, self._left_bytes // (2 * limits.lanes)))
        taken: list[int] = []
        size = characters = 0
        while len(taken) < wire.MOST_OBJECTS:
            source, from_front = self._source(relay, only_leftovers, only_held)
            if not source:
                break
            index = source[0] if from_front else source[-1]
            object_bytes, key_length = self.sizes[index], len(self.keys[index])
            if relay is not None and not self._suits_relays(index, limits.most_bytes):
                source.popleft() if from_front else source.pop()
                self._own.append(index)
                continue
            if taken and (
                size + object_bytes > wanted or characters + key_length > wire.MOST_KEYS_CHARACTERS
            ):
                break
            source.popleft() if from_front else source.pop()
            taken.append(index)
            size += object_bytes
            characters += key_length
        self._left_bytes -= size
        return taken

    def _suits_relays(self, index: int, most_bytes: int) -> bool:
        return 0 < self.sizes[index] <= most_bytes and 0 < len(self.keys[index]) <= wire.MOST_KEY_CHARACTERS

    def _source(self, relay: str | None, only_leftovers: bool, only_held: bool) -> tuple[deque[int], bool]:
        """Where the next object comes from, and whether from its front."""
        if relay is None and self._own:
            return self._own, True
        if relay is not None and only_held:
            return self._parts.get(relay, NOTHING) if relay in self._reserved else NOTHING, True
        if self._returned:
            return self._returned, True
        if relay is not None:
            part = self._parts.get(relay) or self._parts.get(ANYBODY)
            if part:
                return part, True
        elif only_leftovers:
            return self._parts.get(ANYBODY, NOTHING), False
        others = (part for helper, part in self._parts.items() if helper not in self._reserved)
        return max(others, key=len, default=NOTHING), False
