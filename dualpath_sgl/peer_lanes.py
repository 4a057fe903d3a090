"""The peer lanes of one PE rank: one for each page server, made when there is work and gone when there is none."""

from __future__ import annotations

import logging
import threading
from typing import Callable

from dualpath_sgl.page_load import PageLoad
from dualpath_sgl.peer_lane import OnMissing, PeerLane

logger = logging.getLogger(__name__)


class PeerLanes:
    """Any thread may call; a lane that cannot be had costs its load the peer path, nothing else."""

    def __init__(self, make: Callable[[str], PeerLane], on_missing: OnMissing) -> None:
        """`make(endpoint)`: a lane not started yet; `on_missing` as in PeerLane."""
        self._make = make
        self._on_missing = on_missing
        self._lanes: dict[str, PeerLane] = {}
        self._lock = threading.Lock()

    def submit(
        self, endpoint: str, load: PageLoad, room: int, end: int, prompt_hash: str | None = None
    ) -> None:
        """Forward pages `[0, end)` of `load`, or hand them to `on_missing` at once."""
        try:
            while not self.get(endpoint).submit(load, room, end, prompt_hash):
                pass  # it ended just then
        except Exception as error:
            logger.exception("DualPath: no lane to %s", endpoint)
            self._on_missing(load, 0, end, f"no peer lane: {error}")

    def let_go(self, endpoint: str, room: int) -> None:
        """No page of `room` will be pulled: the DE need not hold it."""
        try:
            while not self.get(endpoint).let_go(room):
                pass
        except Exception:
            logger.exception("DualPath: no lane to %s; it holds room %d until its lease ends", endpoint, room)

    def get(self, endpoint: str) -> PeerLane:
        """A running lane.  Raises RuntimeError or OSError when none can be started."""
        with self._lock:
            lane = self._lanes.get(endpoint)
            if lane is None or not lane.is_alive():
                self._lanes = {key: lane for key, lane in self._lanes.items() if lane.is_alive()}
                lane = self._started(endpoint)
                self._lanes[endpoint] = lane
            return lane

    def _started(self, endpoint: str) -> PeerLane:
        lane = self._make(endpoint)
        try:
            lane.start()
        except BaseException:
            lane.close()
            raise
        return lane

    @property
    def quarantined_pages(self) -> int:
        """Host pages that SGLang cannot have yet, because a hung read may still write into them."""
        return sum(lane.quarantined_pages for lane in list(self._lanes.values()))
