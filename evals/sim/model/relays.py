"""Mode relay: a relay on each decode node's storage link, and loads whose lanes meet.

An engine makes one load after another, as SGLang does.  Its node's own link and its relays claim batches of the
load under way,

    pages of a batch = max(1, pages not claimed / (2 * lanes))

as the real client does (`dualpath_sgl.relay.client.claims`), so that all of them end together.  Which engine a
free link reads for is the real relays' rule (`dualpath_sgl.relay.fair_queue`): one with less than an eighth of the most
left, first come first served, or else the one with the most.  Which relays an engine has is the scheduler's
(`scheduler_svc.policies.help_policy.Ring`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from dualpath_sgl.evals.sim.model.engines import Request, SimEngine
from dualpath_sgl.evals.sim.model.loop import EventLoop
from dualpath_sgl.evals.sim.model.storage import StorageLink
from dualpath_sgl.relay.fair_queue import SMALL_SHARE
from scheduler_svc.policies.help_policy import Ring
from scheduler_svc.wire.protocol import RelayInfo


class _Load:
    __slots__ = ("lanes", "request", "unclaimed_pages", "unread_pages")

    def __init__(self, request: Request, pages: int, lanes: int) -> None:
        self.request = request
        self.lanes = lanes
        self.unclaimed_pages = pages
        self.unread_pages = pages

    def claim(self) -> int:
        """Pages of the next batch."""
        pages = max(1, self.unclaimed_pages // (2 * self.lanes))
        self.unclaimed_pages -= pages
        return pages


class RelayLoads:
    def __init__(
        self,
        loop: EventLoop,
        engines: Sequence[SimEngine],
        relay_links: Sequence[StorageLink],
        page_bytes: int,
        read: Callable[[StorageLink, int], None],
        loaded: Callable[[Request], None],
    ) -> None:
        """`engines`: the prefill engines.  `read` is told what has left an engine's queue, which is its own link's,
        whoever read it.
        """
        self._loop = loop
        self._page_bytes = page_bytes
        self._read = read
        self._loaded = loaded
        by_name = {link.name: link for link in relay_links}
        ring = Ring(RelayInfo(name=name, endpoint=f"tcp://{name}:4700") for name in by_name)
        self._lanes: dict[SimEngine, list[StorageLink]] = {}
        for engine in engines:
            relays = ring.from_(ring.first(engine.engine_id))
            self._lanes[engine] = [engine.storage, *(by_name[relay.name] for relay in relays)]
        self._waiting: dict[SimEngine, deque[_Load]] = {engine: deque() for engine in engines}
        """By engine; the first one is under way."""
        self._open: dict[StorageLink, dict[_Load, None]] = {
            link: {} for lanes in self._lanes.values() for link in lanes
        }
        """Loads that a link may claim from, first come first."""
        self._busy: set[StorageLink] = set()

    def ask(self, request: Request, pages: int) -> None:
        """Bring `pages` stored ones to the request's prefill engine."""
        engine = request.prefill
        engine.storage.queued_bytes += pages * self._page_bytes
        waiting = self._waiting[engine]
        waiting.append(_Load(request, pages, len(self._lanes[engine])))
        if len(waiting) == 1:
            self._begin(engine)

    def _begin(self, engine: SimEngine) -> None:
        load = self._waiting[engine][0]
        for link in self._lanes[engine]:
            self._open[link][load] = None
        for link in self._lanes[engine]:
            if link not in self._busy:
                self._claim(link)

    def _claim(self, link: StorageLink) -> None:
        loads = self._open[link]
        if not loads:
            self._busy.discard(link)
            return
        self._busy.add(link)
        load = _next_of(loads)
        pages = load.claim()
        if not load.unclaimed_pages:
            for lane in self._lanes[load.request.prefill]:
                self._open[lane].pop(load, None)
        took_s = pages * self._page_bytes / link.bytes_per_s
        self._loop.at(self._loop.now_s + took_s, self._batch_read, (link, load, pages))

    def _batch_read(self, argument: tuple[StorageLink, _Load, int]) -> None:
        link, load, pages = argument
        bytes_, engine = pages * self._page_bytes, load.request.prefill
        link.read_bytes += bytes_
        link.window_bytes += bytes_
        engine.storage.queued_bytes -= bytes_
        load.unread_pages -= pages
        self._read(engine.storage, bytes_)
        if not load.unread_pages:
            waiting = self._waiting[engine]
            waiting.popleft()
            if waiting:
                self._begin(engine)
            self._loaded(load.request)
        self._claim(link)


def _next_of(loads: dict[_Load, None]) -> _Load:
    """Small ones first, else the neediest."""
    most = max(loads, key=lambda load: load.unread_pages)
    small = most.unread_pages * SMALL_SHARE
    return next((load for load in loads if load.unread_pages <= small), most)
