"""Loads one list of objects after another, or several at once, through every lane there is."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from opentelemetry.trace import Tracer

from dualpath_sgl.control.drain_rate import DrainRate
from dualpath_sgl.lanes.peer_keys import Secure
from dualpath_sgl.relay.client.batch_size import BatchSize
from dualpath_sgl.relay.client.claims import ANYBODY, Blocks, Limits, Load, Pointers, blocks_of
from dualpath_sgl.relay.client.counts import Counts, LaneCounts
from dualpath_sgl.relay.client.lane import RelayLane
from dualpath_sgl.relay.client.memory.destinations import Destinations
from dualpath_sgl.relay.client.memory.transports import Transports
from dualpath_sgl.relay.client.options import Options
from dualpath_sgl.relay.client.prefetch.call import Call, present
from dualpath_sgl.relay.client.relays import Helper, Kind, Relays
from dualpath_sgl.relay.client.spans import OWN, Told, of_load
from dualpath_sgl.relay.client.spread import spread
from dualpath_sgl.relay.resident.whereabouts import Whereabouts
from dualpath_sgl.relay.wire import Hello

logger = logging.getLogger(__name__)

OwnRead = Callable[[list[str], list[Pointers], list[Pointers]], Sequence[int]]
"""The engine's own client: bytes of each object, or a negative code."""

WRONG_SIZE = -1
"""Result of an object of another size than the one asked for, which is another object."""
OVERDUE_S = 2.0
"""When the own client has nothing left to do, batches claimed for relays longer ago are read by it, too.  Nor
does it wait longer for relays that shall read everything and bring nothing."""
LOOK_S = 0.1
HELD = 5
"""Batches of a relay that are in bounce memory, or shall come there, at a time."""


class Loader:
    def __init__(
        self,
        own_read: OwnRead,
        relays: Relays,
        hello: Hello,
        transports: Transports,
        destinations: Destinations,
        options: Options,
        *,
        is_shared: Callable[[str], bool] | None = None,
        secure: Callable[[str], Secure] | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """`own_read` is called on the threads that call `load`.

        `is_shared`: whether other ranks ask for the object of that key, too.  Relays then read it, once for all,
        and the own client only if they do not bring it.
        `secure`: how a socket to the relay of some name is made to speak CURVE; raises KeyFileError.
        """
        self._own_read = own_read
        self._hello = hello
        self._transports = transports
        self._destinations = destinations
        self._options = options
        self._is_shared = is_shared
        self._secure = secure
        self._tracer = tracer
        self._bounce = transports.bounce
        self._own_size = BatchSize(options.batch_bytes)
        self._whereabouts = Whereabouts()
        self._lock = threading.Lock()
        self._lanes: dict[Helper, RelayLane] = {}
        self._open: dict[Load, str | None] = {}
        """Loads under way, oldest first, and the trace of each."""
        self.counts = Counts()
        self.rate = DrainRate()
        """Of the own client's link."""
        self._relays = relays
        relays.follow(self._follow)

    @property
    def kept_back(self) -> int:
        """Pulls that hang: rooms of bounce memory that nobody can use."""
        return self._bounce.kept_back

    def lanes_up(self, kind: Kind = Kind.RELAY) -> list[RelayLane]:
        return [lane for lane in list(self._lanes.values()) if lane.up and lane.helper.kind is kind]

    def exist(self, keys: list[str], stored: Callable[[list[str]], Sequence[int]]) -> list[int]:
        """As `stored` says, 1 for each object that is there; those that a decode engine holds are there, too.

        To be called before these objects are loaded: it asks decode engines, and the load goes by their answers.
        """
        lanes = self.lanes_up(Kind.RESIDENT)
        if lanes:
            for question in self._whereabouts.ask(keys, [lane.helper.label for lane in lanes]):
                for lane in lanes:
                    lane.ask(question)
        exist = list(stored(keys))
        missing = [index for index, there in enumerate(exist) if there != 1] if lanes else []
        if missing:
            self._whereabouts.settle()
            for index in missing:
                if self._whereabouts.holders(keys[index]):
                    exist[index] = 1
        return exist

    def load(self, keys: Sequence[str], pointers: Sequence[Pointers], sizes: Sequence[Pointers]) -> list[int]:
        """Bring each object to its place: its bytes, or a negative code, in the order of `keys`.

        `pointers[i]` and `sizes[i]` are numbers, or equally long lists of them.  When it has returned,
        nothing writes to any of the places.  Raises what `own_read` raises.  A call that is given up ends
        early, with -1 for what has not come.
        """
        blocks = [blocks_of(*place) for place in zip(pointers, sizes, strict=True)]
        call = present()
        with of_load(self._tracer, call) as told:
            told.objects = len(keys)
            is_worth_asking = self._is_worth_asking(blocks)
            load = self._load_through_helpers(keys, blocks) if is_worth_asking else None
            if load is None:
                return self._load_directly(keys, pointers, sizes, blocks, told, is_worth_asking)
            told.brought = load.brought
            self._run(load, pointers, sizes, call, told.traceparent)
            if load.came_back:
                told.fallback = f"{load.came_back} objects did not come from relays"
            return load.results

    def _load_directly(
        self,
        keys: Sequence[str],
        pointers: Sequence[Pointers],
        sizes: Sequence[Pointers],
        blocks: Sequence[Blocks],
        told: Told,
        is_worth_asking: bool,
    ) -> list[int]:
        self.counts.direct_calls += 1
        if not is_worth_asking:
            told.reason = "not worth asking relays"
        elif any(lane.share for lane in list(self._lanes.values()) if lane.helper.kind is Kind.RELAY):
            told.fallback = "no relay answers"
        elif self._lanes:
            told.reason = "the scheduler has no relay help"
        else:
            told.reason = "no relay helps"
        results = self._read(keys, pointers, sizes, blocks)
        told.brought = {OWN: sum(got for got in results if got > 0)}
        return results

    def close(self) -> None:
        """End the lanes; loads under way go on with the own client."""
        self._relays.unfollow(self._follow)
        with self._lock:
            for lane in self._lanes.values():
                lane.stop()
            self._lanes.clear()

    def _load_through_helpers(self, keys: Sequence[str], blocks: Sequence[Blocks]) -> Load | None:
        """None when nobody can help."""
        relays = [lane.helper.label for lane in self.lanes_up()]
        holders = [lane.helper.label for lane in self.lanes_up(Kind.RESIDENT)]
        holder_of = self._holder_of(keys, blocks, holders) if holders else None
        if holder_of is None and not relays:
            return None
        helper_of = self._relay_of(keys, blocks, relays) if self._is_shared and relays else None
        if holder_of is not None:
            others = helper_of or [ANYBODY] * len(keys)
            helper_of = [holder or other for holder, other in zip(holder_of, others, strict=True)]
        return Load(keys, blocks, helper_of, set(holder_of or ()) - {ANYBODY})

    def _relay_of(self, keys: Sequence[str], blocks: Sequence[Blocks], relays: list[str]) -> list[str]:
        assert self._is_shared is not None
        chosen = spread(keys, [place.byte_count for place in blocks], relays)
        return [relay if self._is_shared(key) else ANYBODY for key, relay in zip(keys, chosen, strict=True)]

    def _holder_of(
        self, keys: Sequence[str], blocks: Sequence[Blocks], holders: Sequence[str]
    ) -> list[str] | None:
        """The decode engine that shall bring each object, or `ANYBODY`; None when none has any."""
        self._whereabouts.settle()
        load_of = dict.fromkeys(holders, 0)
        chosen: list[str] = []
        for key, place in zip(keys, blocks, strict=True):
            having = [holder for holder in self._whereabouts.holders(key) if holder in load_of]
            holder = min(having, key=lambda name: load_of[name], default=ANYBODY)
            if holder != ANYBODY:
                load_of[holder] += place.byte_count
            chosen.append(holder)
        return chosen if any(load_of.values()) else None

    def _is_worth_asking(self, blocks: Sequence[Blocks]) -> bool:
        total = sum(place.byte_count for place in blocks)
        return total >= self._options.least_call_bytes and all(
            self._destinations.hold(zip(place.addresses, place.sizes, strict=True)) for place in blocks
        )

    def _run(
        self,
        load: Load,
        pointers: Sequence[Pointers],
        sizes: Sequence[Pointers],
        call: Call,
        traceparent: str | None,
    ) -> None:
        with self._lock:
            self.counts.loads += 1
            self._open[load] = traceparent
        try:
            for lane in list(self._lanes.values()):
                lane.wake()
            self._read_from_the_back(load, pointers, sizes, call)
        finally:
            with self._lock:
                del self._open[load]
            load.close()

    def _read_from_the_back(
        self, load: Load, pointers: Sequence[Pointers], sizes: Sequence[Pointers], call: Call
    ) -> None:
        more = True
        while more and not call.given_up:
            lanes = self.lanes_up()
            helpers_get_on = time.monotonic() < load.landed_s + OVERDUE_S
            relays_get_on = bool(lanes) and helpers_get_on
            shared = self._is_shared is not None
            holders = self.lanes_up(Kind.RESIDENT) if helpers_get_on else ()
            if load.reserve_only([lane.helper.label for lane in holders]):
                for lane in lanes:
                    lane.wake()
            limits = Limits(self._own_size.wanted_bytes, self._bounce.most_bytes, 1 + len(lanes))
            indices = load.claim_own(limits, only_leftovers=shared and relays_get_on)
            if indices:
                begun_s = time.monotonic()
                got = self._read(
                    [load.keys[index] for index in indices],
                    [pointers[index] for index in indices],
                    [sizes[index] for index in indices],
                    [load.destinations[index] for index in indices],
                )
                load.land_own(indices, got)
                self._own_size.landed(sum(count for count in got if count > 0), begun_s)
                continue
            if not shared:
                for lane in lanes:
                    lane.urge(load)
            self.counts.overdue += load.take_back_overdue(time.monotonic() - OVERDUE_S)
            more = load.wait(LOOK_S)

    def _read(
        self,
        keys: Sequence[str],
        pointers: Sequence[Pointers],
        sizes: Sequence[Pointers],
        blocks: Sequence[Blocks],
    ) -> list[int]:
        results: list[int] = []
        self.rate.begin()
        try:
            results = list(self._own_read(list(keys), list(pointers), list(sizes)))
        finally:
            self.rate.end(sum(got for got in results if got > 0))
        for index, (got, place) in enumerate(zip(results, blocks, strict=True)):
            if got > 0 and got != place.byte_count:
                results[index] = WRONG_SIZE
        self.counts.own_objects += len(results)
        self.counts.own_bytes += sum(got for got in results if got > 0)
        return results

    def _limits(self, wanted_bytes: int) -> Limits:
        """Of a helper: all of them find room in bounce memory."""
        relays = len(self.lanes_up())
        holders = frozenset().union(*(load.reserved for load in list(self._open)))
        share = self._bounce.byte_count // (HELD * max(1, relays + len(holders)))
        batch_bytes = min(wanted_bytes, max(share, self._options.batch_bytes))
        return Limits(batch_bytes, self._bounce.most_bytes, 1 + relays)

    def _follow(self, helpers: tuple[Helper, ...]) -> None:
        """These may help, and no others."""
        with self._lock:
            for helper in self._lanes.keys() - set(helpers):
                self._lanes.pop(helper).retire()
            for helper in helpers:
                if helper not in self._lanes:
                    self._begin_lane(helper)
            for helper, lane in self._lanes.items():
                lane.share = self._relays.share(helper.label)

    def _begin_lane(self, helper: Helper) -> None:
        try:
            secure = self._secure(helper.name) if self._secure is not None else None
        except ValueError as error:
            logger.error("DualPath: relay %s is not asked: %s", helper.name, error)
            return
        lane = RelayLane(
            helper,
            self._hello,
            partial(list, self._open),
            self._limits,
            self._open.get,
            self._whereabouts.heard,
            self._transports,
            self._options.silence_s,
            BatchSize(self._options.batch_bytes),
            (self.counts.relays if helper.kind is Kind.RELAY else self.counts.residents).setdefault(
                helper.label, LaneCounts()
            ),
            secure,
        )
        lane.start()
        self._lanes[helper] = lane
