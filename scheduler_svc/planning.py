"""From the reports of both sides to the plan of a room."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from scheduler_svc.events import LaneInputs
from scheduler_svc.ledger.engines import EngineState
from scheduler_svc.ledger.rooms import Claim
from scheduler_svc.policies.lane_model import LaneModel
from scheduler_svc.policies.path_policies import (
    PathChoice,
    PathPolicy,
    SplitReason,
    choose_path,
)
from scheduler_svc.policies.path_request import PathRequest, StoreQueue
from scheduler_svc.wire.protocol import PLAN_TIMEOUT_S, Mode, Path, Plan, common_version

PLAN_DEADLINE_S = 0.8 * PLAN_TIMEOUT_S
"""A report older than this may have timed out at its sender by the time a plan arrives."""


class Obstacle(NamedTuple):
    """Why nothing may be forwarded."""

    name: str
    """Short, to count by."""
    sentence: str
    is_fallback: bool = True
    """No: nothing was ever to be forwarded."""


class Decision(NamedTuple):
    plan: Plan
    reason: str | SplitReason
    lanes: LaneInputs
    obstacle: Obstacle | None


def decide(
    room: int,
    policy: PathPolicy,
    prefill: tuple[EngineState, Claim],
    decode: tuple[EngineState, Claim],
    obstacle: Obstacle | None,
) -> Decision:
    """The plan of `room`.  Changes nothing but the policy's own state."""
    (prefill_engine, prefill_claim), (decode_engine, decode_claim) = prefill, decode
    assert prefill_claim.hit_pages is not None, "a prefill engine's report gives hit_pages"
    request = PathRequest(
        prefill_local_pages=prefill_claim.local_pages,
        decode_local_pages=decode_claim.local_pages,
        hit_pages=prefill_claim.hit_pages,
        page_bytes=prefill_engine.page_bytes,
        prefill=_store_queue(prefill_engine),
        decode=_store_queue(decode_engine),
    )
    if obstacle:
        # Not even min(L_D, K): x = 0 says that nothing may come out of this DE.
        choice = PathChoice(0, f"prefill path without forward: {obstacle.sentence}")
    else:
        choice = choose_path(policy, request)
    split_page = choice.split_page
    plan = Plan(
        room=room,
        path=path_of(request.prefill_local_pages, request.decode_local_pages, request.hit_pages, split_page),
        prefill_id=prefill_engine.engine_id,
        decode_id=decode_engine.engine_id,
        prefill_local_pages=request.prefill_local_pages,
        decode_local_pages=request.decode_local_pages,
        hit_pages=request.hit_pages,
        split_page=split_page,
        decode_endpoints=decode_engine.page_endpoints,
        policy=policy.name,
    )
    return Decision(plan, choice.reason, _lane_inputs(request, choice), obstacle)


def _store_queue(engine: EngineState) -> StoreQueue:
    return StoreQueue(engine.read_queue_bytes, engine.read_rate_bytes_per_s)


def _lane_inputs(request: PathRequest, choice: PathChoice) -> LaneInputs:
    lanes = choice.lanes or LaneModel.of(request)
    split_page = choice.split_page
    prefill, decode = request.prefill, request.decode
    known = lanes.rates_known
    return LaneInputs(
        prefill.read_queue_bytes,
        decode.read_queue_bytes,
        prefill.read_rate_bytes_per_s,
        decode.read_rate_bytes_per_s,
        (lanes.prefill_end(split_page) or None) if known else None,
        (lanes.decode_end(split_page) or None) if known else None,
    )


def relay_obstacle(
    prefill: EngineState, decode: EngineState, relays_of: Callable[[str], str]
) -> Obstacle | None:
    """An engine in relay mode: the PE reads, with its own client and its relays.  None: both load by plans.

    `relays_of` an engine says in words what it was told of relays.
    """
    engine = prefill if prefill.mode is Mode.RELAY else decode
    if engine.mode is not Mode.RELAY:
        return None
    relays = f"; {relays_of(prefill.engine_id)}" if engine is prefill else ""
    return Obstacle("relay", f"{engine.engine_id} is in mode relay{relays}", is_fallback=False)


def prompt_obstacle(prefill: Claim, decode: Claim) -> Obstacle | None:
    """Why the two sides may mean different prompts (a room used twice), or None."""
    if prefill.prompt_tokens != decode.prompt_tokens:
        said = f"prompts of {prefill.prompt_tokens} and {decode.prompt_tokens} tokens"
    elif prefill.prompt_hash and decode.prompt_hash and prefill.prompt_hash != decode.prompt_hash:
        said = f"prompts with the hashes {prefill.prompt_hash} and {decode.prompt_hash}"
    else:
        return None
    return Obstacle("prompt_differs", f"one room for {said}")


def forward_obstacle(prefill: EngineState, decode: EngineState) -> Obstacle | None:
    """Why pages cannot move between two engines, or None."""
    ours, theirs = prefill.shape, decode.shape
    if ours == theirs and ours.is_complete and len(decode.page_endpoints) == theirs.tp_size:
        return _version_obstacle(prefill, decode)
    if ours.tp_size != theirs.tp_size:
        return Obstacle("tp_size_differs", f"tp_size is {ours.tp_size} and {theirs.tp_size}")
    for engine in (prefill, decode):
        if not engine.is_complete:
            live = f"{len(engine.ranks)} of {engine.shape.tp_size} ranks"
            return Obstacle("ranks_missing", f"{live} of {engine.engine_id} are live")
    if len(decode.page_endpoints) < theirs.tp_size:
        count = len(decode.page_endpoints)
        return Obstacle(
            "page_endpoints_missing",
            f"{decode.engine_id} has {count} page servers for {theirs.tp_size} ranks",
        )
    (rank, our_print), (_, their_print) = next(
        (one, other)
        for one, other in zip(ours.fingerprints, theirs.fingerprints, strict=True)
        if one != other
    )
    return Obstacle("fingerprint_differs", f"fingerprints of rank {rank}: {our_print} and {their_print}")


def _version_obstacle(prefill: EngineState, decode: EngineState) -> Obstacle | None:
    ours, theirs = prefill.versions, decode.versions
    if common_version(*ours, of=theirs) is not None:
        return None
    return Obstacle(
        "versions_differ",
        f"{prefill.engine_id} speaks protocol versions {ours[1]} to {ours[0]}, "
        f"{decode.engine_id} {theirs[1]} to {theirs[0]}",
    )


def late_obstacle(waited_s: float, is_any_side_done: bool) -> Obstacle | None:
    """Why engines that wait for a plan may not wait any more, or None."""
    if is_any_side_done or waited_s > PLAN_DEADLINE_S:
        return Obstacle("plan_late", f"the first report is {waited_s:.3f} s old, its engine goes on alone")
    return None


def path_of(prefill_local_pages: int, decode_local_pages: int, hit_pages: int, split_page: int) -> Path:
    """The name of a split (`Path`); arguments are L_P, L_D, K and x."""
    if hit_pages <= prefill_local_pages:
        return Path.NONE
    if split_page <= decode_local_pages:
        return Path.PREFILL
    return Path.DECODE if split_page == hit_pages else Path.SPLIT
