"""What happened: made by `scheduler_svc.state`, listened to by metrics and spans."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from scheduler_svc.policies.path_policies import SplitReason
from scheduler_svc.wire.protocol import Placement, Plan, Role


class PlaceDecided(NamedTuple):
    placement: Placement
    session_id: str | None
    traceparent: str | None
    policy: str
    prefill_wait_s: float
    decode_wait_s: float
    """Until each engine is expected to get to this request; 0 while its rates are unknown."""
    inputs: Mapping[str, str | int | float]
    """`scheduler_svc.policies.placement_policies.Choice.inputs`."""


class LaneInputs(NamedTuple):
    """What a plan knew of the two storage lanes, and what it expects of them."""

    prefill_queue_bytes: int
    decode_queue_bytes: int
    prefill_rate_bytes_per_s: float
    decode_rate_bytes_per_s: float
    """0 while unknown."""
    prefill_end_s: float | None
    decode_end_s: float | None
    """None for a side that reads nothing, and while no rate is known."""


class PlanDecided(NamedTuple):
    plan: Plan
    traceparent: str | None
    """Of the side that reported first, or else of the other."""
    first_report_s: float
    decided_s: float
    reason: str | SplitReason
    """`str` gives the numbers that led to the plan, for people."""
    lanes: LaneInputs
    fallback: str | None = None
    """Why the policy was not asked."""


class FallbackSeen(NamedTuple):
    """A room got a fallback reason it did not have yet."""

    reason: str


class RankDone(NamedTuple):
    engine_id: str
    store_read_bytes: int
    forwarded_bytes: int
    duplicate_store_pages: int
    """Pages newly found to have been read by both sides."""


class RankFaults(NamedTuple):
    """A rank says that so many more exceptions happened in DualPath's code."""

    engine_id: str
    faults: int


class ReadEnded(NamedTuple):
    """A rank's planned storage read went as planned: how good was the plan's expectation?"""

    room: int
    role: Role
    engine_id: str
    traceparent: str | None
    expected_s: float
    actual_s: float
    """From being handed to the store lane to the end of its last transfer; as is `expected_s`."""

    @property
    def error_s(self) -> float:
        """Positive when it took longer than expected."""
        return self.actual_s - self.expected_s


Event = PlanDecided | PlaceDecided | FallbackSeen | RankDone | RankFaults | ReadEnded
