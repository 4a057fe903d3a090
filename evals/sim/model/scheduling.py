"""The scheduler in the simulation: the service's state object, or its policy objects alone.

Both run the objects of `scheduler_svc.policies.placement_policies` and `scheduler_svc.policies.path_policies` unchanged.
`ServiceScheduler` sends `scheduler_svc.state.Cluster` the messages that routers and engines send,
heartbeats included.  `PolicyScheduler` lets the policies look at the engines
directly, at a fifth of the cost: what 48K agents need.  Messages take no time in either.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.sim.model.engines import Request as SimRequest
from dualpath_sgl.evals.sim.model.engines import SimEngine
from dualpath_sgl.evals.sim.model.loop import EventLoop
from dualpath_sgl.evals.sim.model.storage import StorageLink
from scheduler_svc.policies.path_policies import PathPolicy, choose_path, path_policy
from scheduler_svc.policies.path_request import PathRequest, StoreQueue
from scheduler_svc.policies.placement_policies import (
    PLACEMENT_POLICIES,
    PlacementPolicy,
    RandomPlacement,
    placement_policy,
)
from scheduler_svc.policies.placement_rules import ALPHA_S
from scheduler_svc.state import Cluster, Result
from scheduler_svc.wire.protocol import (
    FRESH_S,
    HEARTBEAT_S,
    Done,
    Error,
    Heartbeat,
    LaneRecord,
    Outcome,
    Place,
    Placement,
    Report,
    Request,
    Role,
    Workload,
)

PLACEMENTS = tuple(name for name in PLACEMENT_POLICIES if name != "affinity")
"""Affinity lives from pages that engines still hold; the simulated engines hold none."""


def placement_of(name: str, seed: int) -> PlacementPolicy:
    """Raises EvalError."""
    if name not in PLACEMENTS:
        why = "needs engines that keep pages, which are not simulated" if name == "affinity" else "is unknown"
        raise EvalError(f"placement {name!r} {why}; choose one of {', '.join(PLACEMENTS)}")
    if name == RandomPlacement.name:
        return RandomPlacement(random.Random(f"placement/{seed}"))
    return placement_policy(name)


def path_of(name: str) -> PathPolicy:
    """Raises EvalError."""
    try:
        return path_policy(name)
    except ValueError as error:
        raise EvalError(f"path {error}") from None


class Planned(NamedTuple):
    prefill: SimEngine
    decode: SimEngine
    split_page: int
    room: int


class Scheduler(Protocol):
    def plan(self, prompt_tokens: int, hit_pages: int) -> Planned:
        """Place a request and choose its load path.  The caller then asks the links for its reads."""

    def read_ended(self, link: StorageLink, bytes_: int) -> None:
        """A read on `link` has ended; `link.queued_bytes` counts it no more."""

    def loaded(self, request: SimRequest) -> None:
        """All of its reads have ended."""

    def prefilled(self, request: SimRequest) -> None:
        """Its PE has nothing more to do for it."""

    def finished(self, request: SimRequest) -> None:
        """Nor has its DE."""

    def stop(self) -> None:
        """Nothing more will come."""


def _take(engine: SimEngine, tokens: int) -> None:
    engine.tokens += tokens
    engine.sequences += 1


def _leave(engine: SimEngine, tokens: int) -> None:
    engine.tokens -= tokens
    engine.sequences -= 1


class _SimPlacement(Protocol):
    """A `PlacementPolicy` over simulated engines, which have all that the policies in `PLACEMENTS` look at."""

    def joined(self, engine: SimEngine) -> None: ...

    def lowered(self, engine: SimEngine) -> None: ...

    def place(self, session_id: str | None, prompt_tokens: int) -> tuple[SimEngine, SimEngine, Any, int, int]:
        """A `Choice`."""


class PolicyScheduler:
    """The policies see every engine's present load."""

    def __init__(
        self, engines: Sequence[SimEngine], placement: PlacementPolicy, path: PathPolicy, page_bytes: int
    ) -> None:
        self._placement = cast(_SimPlacement, placement)
        self._path = path
        self._page_bytes = page_bytes
        self._prefill_by_link: dict[StorageLink, list[SimEngine]] = {}
        for engine in engines:
            self._placement.joined(engine)
            if engine.role is Role.PREFILL:
                self._prefill_by_link.setdefault(engine.storage, []).append(engine)

    def plan(self, prompt_tokens: int, hit_pages: int) -> Planned:
        prefill, decode, *_ = self._placement.place(None, prompt_tokens)
        ours, theirs = prefill.storage, decode.storage
        request = PathRequest(
            0,
            0,
            hit_pages,
            self._page_bytes,
            StoreQueue(ours.queued_bytes, ours.bytes_per_s),
            StoreQueue(theirs.queued_bytes, theirs.bytes_per_s),
        )
        split_page = choose_path(self._path, request).split_page
        _take(prefill, prompt_tokens)
        _take(decode, prompt_tokens)
        return Planned(prefill, decode, split_page, 0)

    def read_ended(self, link: StorageLink, bytes_: int) -> None:
        # The class of a PE depends on its node's queue: announce when that falls to alpha.
        threshold = ALPHA_S * link.bytes_per_s
        if link.queued_bytes <= threshold < link.queued_bytes + bytes_:
            for engine in self._prefill_by_link.get(link, ()):
                self._placement.lowered(engine)

    def loaded(self, request: SimRequest) -> None:
        pass

    def prefilled(self, request: SimRequest) -> None:
        _leave(request.prefill, request.turn.prompt_tokens)
        self._placement.lowered(request.prefill)

    def finished(self, request: SimRequest) -> None:
        _leave(request.decode, request.turn.prompt_tokens)
        self._placement.lowered(request.decode)

    def stop(self) -> None:
        pass


class ServiceScheduler:
    """The service's whole state, fed with messages."""

    def __init__(
        self,
        loop: EventLoop,
        engines: Sequence[SimEngine],
        placement: PlacementPolicy,
        path: PathPolicy,
        page_bytes: int,
        seed: int,
    ) -> None:
        self._loop = loop
        self._engines = {engine.engine_id: engine for engine in engines}
        self._page_bytes = page_bytes
        self.cluster = Cluster(path, placement, started_s=0.0, rng=random.Random(f"rooms/{seed}"))
        self._placed = 0
        self._is_open = True
        self._beat_s: dict[str, float] = {}
        """When an engine's last heartbeat was sent, or, after a departure, the next one will be."""
        for index, engine in enumerate(engines):
            self._beat(engine)
            # Engines do not report in step.
            loop.at(HEARTBEAT_S * (index + 1) / len(engines), self._heartbeat, engine)

    def _heartbeat(self, engine: SimEngine) -> None:
        if self._is_open:
            self._beat(engine)
            self._loop.at(self._loop.now_s + HEARTBEAT_S, self._heartbeat, engine)

    def _left(self, engine: SimEngine) -> None:
        """A request has: the engine says so soon, in a heartbeat that tells of every one that leaves until then."""
        now_s, beat_s = self._loop.now_s, self._beat_s[engine.engine_id]
        if beat_s > now_s:
            return
        self._beat_s[engine.engine_id] = max(now_s, beat_s + FRESH_S)
        self._loop.at(self._beat_s[engine.engine_id], self._beat, engine)

    def _beat(self, engine: SimEngine) -> None:
        self._beat_s[engine.engine_id] = self._loop.now_s
        load = Workload(
            sequences=engine.sequences,
            tokens=engine.tokens,
            read_queue_bytes=engine.read_queue_bytes,
            read_rate_bytes_per_s=engine.read_rate_bytes_per_s,
            device_free_tokens=engine.free_device_tokens or 0,
        )
        self._send(Heartbeat(engine=engine.leader, load=load))

    def _send(self, message: Request) -> Result:
        result = self.cluster.handle(message, self._loop.now_s)
        if isinstance(result.reply, Error):
            raise AssertionError(f"the scheduler refused {message}: {result.reply.message}")
        return result

    def plan(self, prompt_tokens: int, hit_pages: int) -> Planned:
        self._placed += 1
        placement = self._send(Place(request_id=str(self._placed), prompt_tokens=prompt_tokens)).reply
        assert isinstance(placement, Placement)
        room = placement.room
        prefill = self._engines[placement.prefill.engine_id]
        decode = self._engines[placement.decode.engine_id]
        self._send(
            Report(
                room=room,
                engine_id=prefill.engine_id,
                role=Role.PREFILL,
                prompt_tokens=prompt_tokens,
                local_pages=0,
                hit_pages=hit_pages,
            )
        )
        pushes = self._send(
            Report(
                room=room,
                engine_id=decode.engine_id,
                role=Role.DECODE,
                prompt_tokens=prompt_tokens,
                local_pages=0,
            )
        ).pushes
        _take(prefill, prompt_tokens)
        _take(decode, prompt_tokens)
        return Planned(prefill, decode, pushes[0][1].split_page, room)

    def read_ended(self, link: StorageLink, bytes_: int) -> None:
        pass  # Heartbeats and Done say so.

    def loaded(self, request: SimRequest) -> None:
        split, hit = request.split_page, request.turn.hit_pages
        self._done(request, request.prefill, split, hit)
        self._done(request, request.decode, 0, split)

    def _done(self, request: SimRequest, engine: SimEngine, first_page: int, end_page: int) -> None:
        lanes: tuple[LaneRecord, ...] = ()
        if end_page > first_page:
            lanes = (
                LaneRecord(
                    lane="store",
                    first_page=first_page,
                    end_page=end_page,
                    bytes=(end_page - first_page) * self._page_bytes,
                    queue_s=0.0,
                    busy_s=self._loop.now_s - request.arrived_s,
                ),
            )
        self._send(
            Done(
                room=request.room,
                engine_id=engine.engine_id,
                role=engine.role,
                outcome=Outcome.OK,
                loaded_pages=end_page - first_page,
                lanes=lanes,
            )
        )

    def prefilled(self, request: SimRequest) -> None:
        _leave(request.prefill, request.turn.prompt_tokens)
        self._left(request.prefill)

    def finished(self, request: SimRequest) -> None:
        _leave(request.decode, request.turn.prompt_tokens)
        self._left(request.decode)

    def stop(self) -> None:
        self._is_open = False
