"""Where a request is, on each side, and where it may go from there.

PE (prefill.py)

    ARRIVED ──> REPORTED ──> PLANNED ──> LOADING ──> DONE
                    └─────> WAITING ───────┘
    From ARRIVED, REPORTED and PLANNED a request may also be DONE at once: it gets no load.

DE (decode.py)

    ARRIVED ──> REPORTED ──> PLANNED ──> LOADING ──> SETTLED
                                            └─> LATE ──┘
    From ARRIVED, REPORTED and PLANNED a request may also be SETTLED at once: this DE reads nothing for it.
    From REPORTED, PLANNED and LOADING it may be ABORTED.

Whoever moves a request does so with its side's lock (PE) or on SGLang's scheduler thread (DE).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TypeVar


class IllegalTransition(RuntimeError):
    """A request was to go where none goes from its state: a defect of DualPath's own."""


class PrefillState(Enum):
    ARRIVED = "arrived"
    """SGLang looks for its stored prefix."""
    REPORTED = "reported"
    """The scheduler knows; neither a plan nor host memory is here."""
    PLANNED = "planned"
    """The plan is here, host memory is not."""
    WAITING = "waiting"
    """Host memory is here, the plan is not."""
    LOADING = "loading"
    """The lanes have its pages."""
    DONE = "done"
    """Nothing more is loaded for its report."""

    def to(self, state: PrefillState) -> PrefillState:
        """`state`.  Raises IllegalTransition."""
        return _checked(PREFILL, self, state)


class DecodeState(Enum):
    ARRIVED = "arrived"
    """It has entered SGLang's queue."""
    REPORTED = "reported"
    """The scheduler knows; SGLang may not admit the request yet."""
    PLANNED = "planned"
    """Every rank has the plan, which is being carried out."""
    LOADING = "loading"
    """SGLang's prefetch of this DE's share is under way, and the request is held back for it."""
    LATE = "late"
    """The prefetch goes on for the PE, and SGLang may admit the request without it."""
    SETTLED = "settled"
    """The plan is carried out or given up: SGLang may admit the request."""
    ABORTED = "aborted"
    """It left SGLang's queue before it was settled."""

    @property
    def admissible(self) -> bool:
        """SGLang may reserve device memory for the request."""
        return self in (DecodeState.LATE, DecodeState.SETTLED)

    def to(self, state: DecodeState) -> DecodeState:
        """`state`.  Raises IllegalTransition."""
        return _checked(DECODE, self, state)


PREFILL: Mapping[PrefillState, frozenset[PrefillState]] = {
    PrefillState.ARRIVED: frozenset({PrefillState.REPORTED, PrefillState.DONE}),
    PrefillState.REPORTED: frozenset(
        {PrefillState.PLANNED, PrefillState.WAITING, PrefillState.LOADING, PrefillState.DONE}
    ),
    PrefillState.PLANNED: frozenset({PrefillState.LOADING, PrefillState.DONE}),
    PrefillState.WAITING: frozenset({PrefillState.LOADING}),
    PrefillState.LOADING: frozenset({PrefillState.DONE}),
    PrefillState.DONE: frozenset(),
}

DECODE: Mapping[DecodeState, frozenset[DecodeState]] = {
    DecodeState.ARRIVED: frozenset({DecodeState.REPORTED, DecodeState.SETTLED}),
    DecodeState.REPORTED: frozenset({DecodeState.PLANNED, DecodeState.SETTLED, DecodeState.ABORTED}),
    DecodeState.PLANNED: frozenset({DecodeState.LOADING, DecodeState.SETTLED, DecodeState.ABORTED}),
    DecodeState.LOADING: frozenset({DecodeState.LATE, DecodeState.SETTLED, DecodeState.ABORTED}),
    DecodeState.LATE: frozenset({DecodeState.SETTLED}),
    DecodeState.SETTLED: frozenset(),
    DecodeState.ABORTED: frozenset(),
}


S = TypeVar("S", PrefillState, DecodeState)


def _checked(allowed: Mapping[S, frozenset[S]], now: S, state: S) -> S:
    if state not in allowed[now]:
        raise IllegalTransition(f"a request goes from {now.value} to {state.value} in no case")
    return state
