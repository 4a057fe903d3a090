"""The peer lanes of one PE rank: one for each page server, there as long as there is work for it."""

from __future__ import annotations

import threading
from collections.abc import Callable

from dualpath_sgl.lanes.page_load import PageLoad
from dualpath_sgl.lanes.peer_lane import PeerLane


class PeerLanes:
    """Safe from any thread."""

    def __init__(self, make: Callable[[str, str, str], PeerLane], fingerprint: str) -> None:
        """`make(endpoint, engine_id, fingerprint)`: a lane, not started yet, to that page server of that DE,
        for pages of that fingerprint."""
        self._make = make
        self._fingerprint = fingerprint
        self._lanes: dict[str, PeerLane] = {}
        self._lock = threading.Lock()

    def submit(
        self,
        endpoint: str,
        engine_id: str,
        load: PageLoad,
        room: int,
        end: int,
        prompt_hash: str | None = None,
    ) -> None:
        """Forward pages `[0, end)` of `load` (`PeerLane.submit`).

        Raises whatever kept a lane from being made or started; `load` is untouched then.
        """
        while not self._lane(endpoint, engine_id).submit(load, room, end, prompt_hash):
            pass  # it ended just then

    def let_go(self, endpoint: str, engine_id: str, room: int) -> None:
        """No page of `room` will be pulled: the DE need not hold it.  Raises as `submit` does."""
        while not self._lane(endpoint, engine_id).let_go(room):
            pass

    def rename_layout(self, fingerprint: str) -> None:
        """Every lane asks for pages of this fingerprint from now on."""
        with self._lock:
            self._fingerprint = fingerprint
            for lane in self._lanes.values():
                lane.fingerprint = fingerprint

    def _lane(self, endpoint: str, engine_id: str) -> PeerLane:
        with self._lock:
            lane = self._lanes.get(endpoint)
            if lane is None or not lane.is_alive():
                self._lanes = {key: lane for key, lane in self._lanes.items() if lane.is_alive()}
                lane = _started(self._make(endpoint, engine_id, self._fingerprint))
                self._lanes[endpoint] = lane
            return lane


def _started(lane: PeerLane) -> PeerLane:
    try:
        lane.start()
    except BaseException:
        lane.close()
        raise
    return lane
