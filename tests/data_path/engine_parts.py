"""The collaborators of either side of an engine rank: DualPath's own, with a channel that only takes notes.

No thread runs: what a test hands to the store lane stays there.
"""

from __future__ import annotations

from types import SimpleNamespace

from data_path_world import host_pool
from opentelemetry.trace import NoOpTracer
from prometheus_client import CollectorRegistry

from dualpath_sgl.control.workload import RankWorkload
from dualpath_sgl.decode import DecodeSide
from dualpath_sgl.lanes.loads import Loads
from dualpath_sgl.lanes.page_server import PageServer
from dualpath_sgl.lanes.peer_lanes import PeerLanes
from dualpath_sgl.lanes.store_lane import StoreLane
from dualpath_sgl.metrics.rank import RankMetrics
from dualpath_sgl.pools.integrity import PoolCheck
from dualpath_sgl.pools.layout import page_bytes
from dualpath_sgl.prefill import PrefillSide
from dualpath_sgl.restore import RestoreGuard
from dualpath_sgl.room_reports import RoomReports
from scheduler_svc.wire.protocol import Done, RankInfo, Report, Role

LONG_S = 60.0


class Channel:
    """To a scheduler that is there (`connected`) and says nothing."""

    def __init__(self, connected: bool = True) -> None:
        self.connected = connected
        self.sent: list[Report | Done] = []
        self.departures = 0

    def send(self, message: Report | Done) -> None:
        self.sent.append(message)

    def left(self) -> None:
        self.departures += 1


class EngineParts:
    """`side` is a PE's or a DE's; `as_runtime` what hooks take for the engine's runtime."""

    def __init__(
        self, role: Role, *, page_tokens: int = 16, connected: bool = True, plan_timeout_s: float = LONG_S,
        new_lane=None, fingerprint: str = "layout-1",
    ) -> None:  # fmt: skip
        """`new_lane` makes a PE's peer lanes (`PeerLanes`)."""
        self.channel = Channel(connected)
        self.pool = host_pool(4, page_tokens)
        self.store_lane = StoreLane()
        self.page_bytes = page_bytes(self.pool)
        self.registry = CollectorRegistry()
        self.metrics = RankMetrics(
            RankInfo(
                engine_id=f"{role.value}-0", role=role, url="http://127.0.0.1:1", fingerprint=fingerprint,
                page_size=page_tokens, page_bytes=self.page_bytes,
            ),
            self.registry,
        )  # fmt: skip
        self.loads = Loads(self.store_lane, self.page_bytes)
        reports = RoomReports(
            engine_id=f"{role.value}-0",
            role=role,
            rank=0,
            control=self.channel,
            plan_timeout_s=plan_timeout_s,
            tracer=NoOpTracer(),
            on_over=self.metrics.room_over,
        )
        self.server: PageServer | None = None
        if role is Role.PREFILL:
            self.side: PrefillSide | DecodeSide = PrefillSide(
                rank=0,
                page_size=page_tokens,
                reports=reports,
                loads=self.loads,
                store_lane=self.store_lane,
                peer_lanes=PeerLanes(new_lane, fingerprint),
                left=self.channel.left,
            )
        else:
            self.server = PageServer("127.0.0.1", "nowhere", fingerprint, LONG_S, LONG_S)
            self.side = DecodeSide(
                tp_size=1,
                pool=self.pool,
                reports=reports,
                loads=self.loads,
                store_lane=self.store_lane,
                server=self.server,
                restores=RestoreGuard(NoOpTracer()),
                left=self.channel.left,
            )
        self.workload = RankWorkload(
            side=self.side,
            store_lane=self.store_lane,
            loads=self.loads,
            pool=self.pool,
            pool_check=PoolCheck(self.pool),
        )

    @property
    def sent(self) -> list[Report | Done]:
        """To the scheduler, in order."""
        return self.channel.sent

    @property
    def as_runtime(self) -> SimpleNamespace:
        return SimpleNamespace(side=self.side, workload=self.workload, loads=self.loads)
