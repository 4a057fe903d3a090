"""Words the scheduler tests are told in: engines, reports and dones with short arguments."""

from __future__ import annotations

import re

from scheduler_svc.ledger.engines import EngineTable
from scheduler_svc.ledger.rooms import RoomTable
from scheduler_svc.policies.path_policies import path_policy
from scheduler_svc.policies.placement_policies import placement_policy
from scheduler_svc.state import Cluster, Result
from scheduler_svc.wire.protocol import (
    Done,
    Heartbeat,
    LaneRecord,
    Outcome,
    Plan,
    RankInfo,
    RelayHeartbeat,
    RelayInfo,
    RelayLoad,
    Report,
    Role,
    Workload,
    decode_request,
    encode,
)

PAGE_TOKENS = 16
PAGE_BYTES = 1000
IDLE = Workload()


def engine(engine_id: str, *, rank: int = 0, tp_size: int = 1, **changes) -> RankInfo:
    """A PE when the name begins with `p`, else a DE with a page server."""
    role = Role.PREFILL if engine_id.startswith("p") else Role.DECODE
    host = engine_id.strip("/").replace("/", "-")
    fields = {
        "engine_id": engine_id,
        "role": role,
        "rank": rank,
        "tp_size": tp_size,
        "url": f"http://127.0.0.1:{30_000 + int(re.sub('[^0-9]', '', engine_id) or 0) % 10_000}",
        "page_endpoint": f"tcp://{host}:{1000 + rank}" if role is Role.DECODE else None,
        "fingerprint": "layout-1",
        "page_size": PAGE_TOKENS,
        "page_bytes": PAGE_BYTES,
    }
    return RankInfo(**fields | changes)


def heartbeat(
    engine_id: str, *, load: Workload = IDLE, hello: bool = False, version: int = 1, **changes
) -> Heartbeat:
    return Heartbeat(engine=engine(engine_id, **changes), load=load, hello=hello, version=version)


def relay_beat(name: str, *, port: int = 4700, hello: bool = False, **load) -> RelayHeartbeat:
    info = RelayInfo(name=name, endpoint=f"tcp://{name}:{port}", ring_bytes=1000)
    return RelayHeartbeat(relay=info, load=RelayLoad(**load), version=2, oldest_version=2, hello=hello)


def prefill_report(room: int, local: int, hit: int, *, by: str = "p0", rank: int = 0, **more) -> Report:
    return Report(
        room=room, engine_id=by, role=Role.PREFILL, rank=rank, prompt_tokens=100_000,
        local_pages=local, hit_pages=hit, **more,
    )  # fmt: skip


def decode_report(room: int, local: int, *, by: str = "d0", rank: int = 0, **more) -> Report:
    return Report(
        room=room, engine_id=by, role=Role.DECODE, rank=rank, prompt_tokens=100_000, local_pages=local, **more
    )


def lane(name: str, first_page: int, end_page: int) -> LaneRecord:
    return LaneRecord(
        lane=name, first_page=first_page, end_page=end_page,
        bytes=(end_page - first_page) * PAGE_BYTES, queue_s=0, busy_s=0,
    )  # fmt: skip


def done(room: int, by: str, *lanes: LaneRecord, rank: int = 0, reason: str | None = None, loaded: int = 0):
    return Done(
        room=room,
        engine_id=by,
        role=Role.PREFILL if by.startswith("p") else Role.DECODE,
        rank=rank,
        outcome=Outcome.FALLBACK if reason else Outcome.OK,
        fallback_reason=reason,
        loaded_pages=loaded,
        lanes=lanes,
    )


def cluster(policy: str = "decode", *engines: Heartbeat, placement: str = "round_robin", **limits) -> Cluster:
    """A cluster at time 0, a minute after its start, with the given engines, or one PE `p0` and one DE `d0`."""
    made = Cluster(
        path_policy(policy), placement_policy(placement), started_s=-60.0,
        engines=EngineTable(), rooms=RoomTable(**limits),
    )  # fmt: skip
    for beat in engines or (heartbeat("p0"), heartbeat("d0")):
        assert made.handle(beat, 0.0) == Result()
    return made


def plan_of(result: Result) -> Plan:
    """The single plan in a result, whoever it goes to."""
    plans = {encode(plan): plan for _, plan in result.pushes}
    assert len(plans) == 1, result
    return next(iter(plans.values()))


def receivers(result: Result) -> list[tuple[str, int]]:
    return [tuple(key) for key, _ in result.pushes]


def is_a_message(frames: list[bytes]) -> bool:
    """Whether they are what a peer might send: hypothesis tries constants of the code, too."""
    try:
        return len(frames) == 1 and bool(decode_request(frames[0]))
    except ValueError:
        return False


def planned_bytes(state: Cluster, engine_id: str) -> int:
    return sum(rank.planned_bytes for rank in state.engines.get(engine_id).ranks.values())


def snapshot(state: Cluster) -> str:
    """Everything that a refused message must leave alone (its error is counted, no more)."""
    return repr(
        (
            state.engines._live,
            list(state.engines._by_age),
            state.relays._live,
            list(state.relays._by_age),
            state.rooms._open,
            state.rooms._closed,
            state.paths,
            state.fallbacks,
            state.duplicate_store_pages,
        )
    )
