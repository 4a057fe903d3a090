"""From a trace to the turns that are replayed: how long, sharing what, scaled to the model.

A trace says which prompt blocks requests share, not what the model answered.  The paper's replay
rule (section 7: next prompt = context + generated tokens + append) wants the real answers in the
next prompt.  Both hold at once, because every prompt here is built from an earlier transcript:

* the request contains its parent's prompt completely and is longer: context = parent's prompt +
  the tokens really generated for it, followed by new tokens (`keeps_answer`);
* it leaves the parent at block `b` (edited or compacted context): context = the parent's prompt
  up to the scaled place of block `b`, followed by new tokens;
* it shares nothing: new tokens only.

The parent is the earlier request with the longest common prefix of `hash_ids`, so branches and
returns to an older branch stay what they are in the data.

Lengths are multiplied by one factor for the whole workload, chosen so that the longest prompt
with its answer fits `max_context_tokens`.  Answers are at least `MIN_OUTPUT_TOKENS` long and
every turn brings at least one new token.  These floors shift later positions, so each turn keeps
the pairs (raw length, scaled length) along its prompt; a cut is placed between them by
interpolation, and two requests that agree up to block `b` agree up to the same scaled token.

More agents than sessions: a session is used again with one synthetic round of random tokens and
a single generated token before it (the paper's rule), so that copies share nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from dualpath_sgl.evals.agents import trace
from dualpath_sgl.evals.agents.trace import Sharing, TraceSession
from dualpath_sgl.evals.common.errors import EvalError

MIN_OUTPUT_TOKENS = 4
_FACTOR_STEPS = 40
"""Bisection steps: 2**-40 is far below one token of any context."""


class Turn(NamedTuple):
    """One request of a session, ready to be built; lengths are scaled tokens."""

    parent: int | None
    """Index of the turn whose transcript is the context; None: the prompt is all new."""
    kept_tokens: int
    """Tokens of the parent's prompt that the prompt begins with."""
    keeps_answer: bool
    """The parent's answer follows them (then `kept_tokens` is the parent's whole prompt)."""
    new_tokens: int
    prompt_tokens: int
    output_tokens: int
    reusable_tokens: int
    """Prompt tokens whose KV an infinite cache of this session holds: what is shared, without
    the parent's last generated token, whose KV is computed only by a turn that follows it."""
    think_s: float = 0.0
    """What the trace's agent did before it asked."""

    def hit_tokens(self, page_size: int) -> int:
        """Reusable tokens in whole pages."""
        return self.reusable_tokens // page_size * page_size


class SessionPlan(NamedTuple):
    id: str
    turns: tuple[Turn, ...]


class Workload(NamedTuple):
    sessions: tuple[SessionPlan, ...]
    factor: float
    """Scaled tokens per trace token, at most 1."""
    page_size: int
    raw_hit_rate: float
    """Theoretical hit rate of the chosen trace requests (each session once), whole blocks,
    infinite cache."""

    @property
    def requests(self) -> int:
        return sum(len(session.turns) for session in self.sessions)

    @property
    def hit_rate(self) -> float:
        """Theoretical hit rate of what is replayed: whole pages, infinite cache (0 to 1)."""
        turns = [turn for session in self.sessions for turn in session.turns]
        return sum(turn.hit_tokens(self.page_size) for turn in turns) / sum(
            turn.prompt_tokens for turn in turns
        )

    @property
    def longest_tokens(self) -> int:
        """Prompt and answer of the longest turn."""
        return max(_longest(session.turns) for session in self.sessions)


class _Mark(NamedTuple):
    """A place in a prompt: raw trace tokens before it, scaled tokens before it."""

    raw: int
    scaled: int


class Stretch(NamedTuple):
    """Lengths apart from the common factor, for sweeps over one of them."""

    append: float = 1.0
    """Times the new tokens of every prompt that continues an earlier one."""
    generation: float = 1.0
    """Times the generated tokens."""


AS_IT_IS = Stretch()


def scale_session(
    session: TraceSession,
    shares: Sequence[Sharing | None],
    factor: float,
    prelude_tokens: int = 0,
    stretch: Stretch = AS_IT_IS,
) -> tuple[Turn, ...]:
    """The turns of one session with all lengths multiplied by `factor` (> 0), and by what `stretch` says.

    `shares` is `trace.sharings(session)`.  `prelude_tokens` > 0 puts one synthetic round before it,
    which every prompt then begins with.
    """
    turns: list[Turn] = []
    if prelude_tokens:
        turns.append(Turn(None, 0, False, prelude_tokens, prelude_tokens, 1, 0))
    offset = len(turns)
    marks: list[list[_Mark]] = []

    for request, shared in zip(session.requests, shares, strict=True):
        output = max(MIN_OUTPUT_TOKENS, round(request.output_tokens * factor * stretch.generation))
        raw_kept = 0
        path = [_Mark(0, prelude_tokens + 1 if prelude_tokens else 0)]
        parent, kept, keeps_answer = (0, prelude_tokens, True) if prelude_tokens else (None, 0, False)

        if shared and shared.extends:
            before = session.requests[shared.parent]
            parent, keeps_answer = shared.parent + offset, True
            kept = turns[parent].prompt_tokens
            path = marks[shared.parent]
            raw_kept = before.prompt_tokens + before.output_tokens
        elif shared:
            raw_kept = min(shared.blocks * session.block_size, request.prompt_tokens)
            cut = _place(marks[shared.parent], raw_kept)
            path = [mark for mark in marks[shared.parent] if mark.raw < raw_kept] + [_Mark(raw_kept, cut)]
            if cut > path[0].scaled:
                parent, kept, keeps_answer = shared.parent + offset, cut, False

        context = kept + (turns[parent].output_tokens if parent is not None and keeps_answer else 0)
        new = max(
            1, round((request.prompt_tokens - raw_kept) * factor * (stretch.append if raw_kept else 1.0))
        )
        turns.append(
            Turn(
                parent=parent,
                kept_tokens=kept,
                keeps_answer=keeps_answer,
                new_tokens=new,
                prompt_tokens=context + new,
                output_tokens=output,
                reusable_tokens=context - 1 if keeps_answer else context,
                think_s=max(0.0, request.think_s or 0.0),
            )
        )
        marks.append([*path, _Mark(request.prompt_tokens, context + new)])
    return tuple(turns)


def build(
    sessions: Sequence[TraceSession],
    *,
    agents: int,
    turns: int | None,
    max_context_tokens: int,
    page_size: int,
    stretch: Stretch = AS_IT_IS,
) -> Workload:
    """The workload of `agents` agents, each with the first `turns` requests of one session.

    Raises EvalError when the turns cannot be scaled down to `max_context_tokens`.
    """
    if agents < 1:
        raise EvalError(f"agents is {agents}; give at least 1")
    if turns is not None and turns < 1:
        raise EvalError(f"turns is {turns}; give at least 1")
    cut = [session.model_copy(update={"requests": session.requests[:turns]}) for session in sessions[:agents]]
    shares = [trace.sharings(session) for session in cut]
    names = _names([session.id for session in cut], agents)

    def plan(agent: int, factor: float) -> SessionPlan:
        copy, source = divmod(agent, len(cut))
        return SessionPlan(
            names[agent],
            scale_session(cut[source], shares[source], factor, page_size if copy else 0, stretch),
        )

    def plans(factor: float) -> tuple[SessionPlan, ...]:
        return tuple(plan(agent, factor) for agent in range(agents))

    def longest(factor: float) -> int:
        return max(_longest(plan.turns) for plan in plans(factor))

    low, high = 0.0, 1.0
    if longest(high) <= max_context_tokens:
        low = high
    elif (least := longest(low)) > max_context_tokens:
        raise EvalError(
            f"max context is {max_context_tokens} tokens, but the chosen turns need at least {least} even "
            f"when scaled to nothing ({MIN_OUTPUT_TOKENS} generated and 1 new token a turn); "
            "choose fewer turns or a longer context"
        )
    else:
        for _ in range(_FACTOR_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if longest(middle) <= max_context_tokens else (low, middle)

    return Workload(plans(low), low, page_size, trace.theoretical_hit_rate(cut))


def _names(ids: Sequence[str], agents: int) -> list[str]:
    """One for each agent, no two alike: answers are kept by them, and files may repeat an id."""
    names: list[str] = []
    taken: set[str] = set()
    for agent in range(agents):
        copy, source = divmod(agent, len(ids))
        name = wanted = f"{ids[source]}#{copy}" if copy else ids[source]
        number = 1
        while name in taken:
            number += 1
            name = f"{wanted}~{number}"
        taken.add(name)
        names.append(name)
    return names


def _longest(turns: Sequence[Turn]) -> int:
    return max(turn.prompt_tokens + turn.output_tokens for turn in turns)


def _place(marks: Sequence[_Mark], raw: int) -> int:
    """Scaled place of raw token `raw`, between the marks around it."""
    for left, right in pairwise(marks):
        if left.raw <= raw <= right.raw:
            share = (raw - left.raw) * (right.scaled - left.scaled)
            return left.scaled + (share // (right.raw - left.raw) if right.raw > left.raw else 0)
    raise AssertionError(f"raw place {raw} lies outside of {marks}")
