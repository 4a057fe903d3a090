"""Agents' turns with what each costs, from Table 2's statistics or from a trace.

Replay rule of the paper (section 7): a turn's context is everything before it, generation lengths
are forced, tools take no time.  Hits are computed within a trajectory, in whole pages, and
nothing is evicted.  Engines hold nothing from earlier turns (the paper has no DRAM cache), so
every hit page is read from the store.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dualpath_sgl.evals.agents import table2, trace
from dualpath_sgl.evals.agents.trace import TraceSession
from dualpath_sgl.evals.agents.workload import scale_session
from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.sim.model.hardware import Hardware
from dualpath_sgl.evals.sim.model.models import Model

PAGE_TOKENS = 64
"""Paper, section 4: a block of, e.g., 64 tokens."""

TRAJECTORIES = 500
"""Paper, Table 2: a row describes 500 trajectories."""


class Lengths(NamedTuple):
    """One turn of a trajectory, in tokens."""

    prompt: int
    hit: int
    """Whole pages."""
    output: int


Trajectory = tuple[Lengths, ...]


class Turn(NamedTuple):
    """One turn as the engines see it; every turn of every agent shares these."""

    prompt_tokens: int
    output_tokens: int
    hit_pages: int
    hit_bytes: int
    new_bytes: int
    """KV of the prompt that is not stored yet."""
    attention_s: float
    experts_s: float
    """As if one GPU computed it alone."""


class Workload(NamedTuple):
    agents: tuple[tuple[Turn, ...], ...]
    page_bytes: int
    mean_context_tokens: float
    """Over all turns of all agents."""
    prefill_tokens_per_s: float
    """Prompt tokens, hits included, that one engine gets through: the profile behind the paper's beta."""

    @property
    def turns(self) -> int:
        return sum(len(turns) for turns in self.agents)

    @property
    def hit_bytes(self) -> int:
        return sum(turn.hit_bytes for turns in self.agents for turn in turns)

    @property
    def longest_tokens(self) -> int:
        return max(turn.prompt_tokens + turn.output_tokens for turns in self.agents for turn in turns)


def table2_trajectories(row: str, seed: int) -> list[Trajectory]:
    """Raises EvalError when there is no such row."""
    if row not in table2.ROWS:
        raise EvalError(f"table 2 row {row!r} is unknown; choose one of {', '.join(table2.ROWS)}")
    sessions = table2.trajectories(table2.ROWS[row], TRAJECTORIES, seed)
    return [tuple(_growing(session)) for session in sessions]


def _growing(session: TraceSession) -> Iterator[Lengths]:
    """Every prompt holds the whole transcript before it; its last generated token has no KV yet."""
    context = 0
    for request in session.requests:
        hit = max(0, context - 1) // PAGE_TOKENS * PAGE_TOKENS
        yield Lengths(request.prompt_tokens, hit, request.output_tokens)
        context = request.prompt_tokens + request.output_tokens


def trace_trajectories(path: Path) -> list[Trajectory]:
    """Sessions of a trace in claude-code-weka form at their own lengths.  Raises EvalError."""
    return [
        tuple(
            Lengths(turn.prompt_tokens, turn.hit_tokens(PAGE_TOKENS), turn.output_tokens)
            for turn in scale_session(session, trace.sharings(session), 1.0)
        )
        for session in trace.load_sessions(path)
    ]


def with_appends(sessions: Sequence[Trajectory], factor: float, max_len: int) -> list[Trajectory]:
    """The same turns with so many times the appended tokens; a session ends before `max_len` tokens."""
    return [tuple(_appending(session, factor, max_len)) for session in sessions]


def _appending(session: Trajectory, factor: float, max_len: int) -> Iterator[Lengths]:
    context = transcript = 0
    for turn in session:
        # What the first turn brings is no append.
        appended = turn.prompt if not context else max(1, round((turn.prompt - transcript) * factor))
        prompt = context + appended
        if prompt + turn.output > max_len:
            return
        yield Lengths(prompt, max(0, context - 1) // PAGE_TOKENS * PAGE_TOKENS, turn.output)
        context, transcript = prompt + turn.output, turn.prompt + turn.output


def workload(
    trajectories: Sequence[Trajectory], agents: int, model: Model, hardware: Hardware, seed: int
) -> Workload:
    """`agents` agents; those beyond the number of trajectories draw one again and share nothing with
    its first user (the paper's rule; its synthetic first round of random tokens is left out)."""
    if agents < 1:
        raise EvalError(f"agents is {agents}; give at least 1")
    rng = random.Random(f"agents/{seed}")
    priced = [tuple(_turn(lengths, model, hardware) for lengths in trajectory) for trajectory in trajectories]
    chosen = [priced[index] if index < len(priced) else rng.choice(priced) for index in range(agents)]
    turns = [turn for trajectory in priced for turn in trajectory]
    prompts = sum(turn.prompt_tokens for turn in turns)
    return Workload(
        tuple(chosen),
        PAGE_TOKENS * model.kv_bytes_per_token,
        prompts / len(turns),
        prompts / sum(turn.attention_s + turn.experts_s for turn in turns),
    )


def _turn(lengths: Lengths, model: Model, hardware: Hardware) -> Turn:
    new_tokens = lengths.prompt - lengths.hit
    work = model.prefill_work(new_tokens, lengths.hit)
    return Turn(
        lengths.prompt,
        max(1, lengths.output),
        lengths.hit // PAGE_TOKENS,
        lengths.hit * model.kv_bytes_per_token,
        new_tokens * model.kv_bytes_per_token,
        work.attention / hardware.prefill_flop_per_s,
        work.experts / hardware.prefill_flop_per_s,
    )
