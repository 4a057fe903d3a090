"""Simulated engines: what the scheduler's policies read of them, and what the simulation keeps there."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from dualpath_sgl.evals.sim.model.storage import StorageLink
from dualpath_sgl.evals.sim.model.workload import Turn
from scheduler_svc.wire.protocol import RankInfo as Description
from scheduler_svc.wire.protocol import Role


@dataclass(slots=True, eq=False)
class SimEngine:
    """One GPU.  Has the attributes of `scheduler_svc.policies.placement_rules.EngineLoad` and of
    `scheduler_svc.ledger.engines.EngineState` that policies look at."""

    leader: Description
    storage: StorageLink
    page_bytes: int
    tokens_per_s: float
    free_device_tokens: int | None = None
    """What a DE has; a PE does not say."""
    tokens: int = 0
    """tok_e: prompt tokens of what it has been given and not finished."""
    sequences: int = 0
    ready: deque[Request] = field(default_factory=deque)
    """PE: loaded and not computed.  DE: computed and without HBM."""
    batch: int = 0
    """DE: sequences being decoded."""
    nic_free_s: float = 0.0
    """DE: when its compute NIC has made the copies asked of it."""

    @property
    def engine_id(self) -> str:
        return self.leader.engine_id

    @property
    def role(self) -> Role:
        return self.leader.role

    @property
    def page_size(self) -> int:
        return self.leader.page_size

    @property
    def read_queue_bytes(self) -> int:
        """Its node's: the link is shared (the paper's read_q_n)."""
        return self.storage.queued_bytes

    @property
    def read_rate_bytes_per_s(self) -> float:
        return self.storage.bytes_per_s


@dataclass(slots=True, eq=False)
class Request:
    """One turn on its way."""

    agent: int
    index: int
    turn: Turn
    arrived_s: float
    prefill: SimEngine
    decode: SimEngine
    split_page: int
    room: int = 0
    """The scheduler service's number for it; 0 without it."""
    reads: int = 0
    """Storage reads still going on."""
    attention_left_s: float = 0.0
    experts_left_s: float = 0.0
    prefilled_s: float = 0.0
    decode_begun_s: float = 0.0
