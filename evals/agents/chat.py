"""Sessions of full text, and what is replayed of them through a chat template.

The next prompt is the messages so far, what was really answered included, and a new user message.  Texts
are cut to one share of their characters, the same for all, so that the longest session fits.  Tokens
are counted with the model's own tokenizer; the forced length of an answer is that of the trace's, cut
alike.  Every agent begins with a line of random letters, longer than a page, so that agents, and runs with
other seeds, share nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dualpath_sgl.evals.agents.workload import MIN_OUTPUT_TOKENS, Stretch
from dualpath_sgl.evals.common.errors import EvalError

TEMPLATE_TOKENS = 40
"""What a chat template may add to a message and the answer that follows, generously."""
ANSWER_GROWTH = 3
"""A random model's bytes are no UTF-8: each may come back as a mark of three."""
_FACTOR_STEPS = 20

Count = Callable[[str], int]
"""Tokens of a text."""


class TextTurn(NamedTuple):
    """One request of a recorded session."""

    text: str
    """What the prompt adds to the one before, or all of it."""
    continues: bool
    """The prompt begins with the whole one before."""
    output: str
    think_s: float


class TextSession(NamedTuple):
    id: str
    turns: tuple[TextTurn, ...]


class ChatTurn(NamedTuple):
    text: str
    continues: bool
    prompt_tokens: int
    """Estimated, and not too low."""
    output_tokens: int
    think_s: float


class ChatPlan(NamedTuple):
    id: str
    turns: tuple[ChatTurn, ...]


class ChatWorkload(NamedTuple):
    sessions: tuple[ChatPlan, ...]
    factor: float
    """Replayed characters per character of the trace, at most 1."""
    page_size: int

    @property
    def requests(self) -> int:
        return sum(len(session.turns) for session in self.sessions)

    @property
    def longest_tokens(self) -> int:
        """Prompt and answer of the longest turn, estimated."""
        return max(_longest(session.turns) for session in self.sessions)


def counter(model: Path) -> Count:
    """Counts with the tokenizer of a model directory.  Raises EvalError."""
    from tokenizers import Tokenizer

    file = model / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # The library raises nothing narrower.
        raise EvalError(f"{file}: no tokenizer ({error}); full text needs a model that has one") from None
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def build(
    sessions: Sequence[TextSession],
    *,
    agents: int,
    turns: int | None,
    max_context_tokens: int,
    page_size: int,
    count: Count,
    stretch: Stretch,
) -> ChatWorkload:
    """`agents` agents, each with the first `turns` requests of one session.

    Raises EvalError when the turns cannot be cut down to `max_context_tokens`.
    """
    if agents < 1 or (turns is not None and turns < 1):
        raise EvalError(f"agents is {agents} and turns is {turns}; give at least 1 of each")
    outputs = {turn.output: count(turn.output) for session in sessions for turn in session.turns}

    def plan(agent: int, factor: float) -> ChatPlan:
        copy, source = divmod(agent, len(sessions))
        session = sessions[source]
        name = f"{session.id}#{copy}" if copy else session.id
        opening_tokens = count(opening(name, 0, page_size))
        cut = _cut(session.turns[:turns], factor, opening_tokens, count, outputs, stretch)
        return ChatPlan(name, tuple(cut))

    def longest(factor: float) -> int:
        return max(_longest(plan(agent, factor).turns) for agent in range(agents))

    low, high = 0.0, 1.0
    if longest(high) <= max_context_tokens:
        low = high
    elif (least := longest(low)) > max_context_tokens:
        raise EvalError(
            f"max context is {max_context_tokens} tokens, but the chosen turns need up to {least} even when "
            "cut to nothing; choose fewer turns or a longer context"
        )
    else:
        for _ in range(_FACTOR_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if longest(middle) <= max_context_tokens else (low, middle)
    return ChatWorkload(tuple(plan(agent, low) for agent in range(agents)), low, page_size)


def _cut(
    turns: Sequence[TextTurn],
    factor: float,
    opening_tokens: int,
    count: Count,
    outputs: dict[str, int],
    stretch: Stretch,
) -> Iterator[ChatTurn]:
    context = opening_tokens
    for turn in turns:
        share = factor * (stretch.append if turn.continues else 1.0)
        text = _stretched(turn.text, share)
        if not turn.continues:
            context = opening_tokens
        output_tokens = max(MIN_OUTPUT_TOKENS, round(outputs[turn.output] * factor * stretch.generation))
        prompt_tokens = context + count(text) + TEMPLATE_TOKENS
        yield ChatTurn(text, turn.continues, prompt_tokens, output_tokens, turn.think_s)
        context = prompt_tokens + ANSWER_GROWTH * output_tokens


def _stretched(text: str, share: float) -> str:
    """`share` of the text's characters, at least one; above 1 it begins again."""
    wanted = max(1, round(len(text) * share))
    return (text * (wanted // max(1, len(text)) + 1))[:wanted] or "."


def opening(session: str, seed: int, page_size: int) -> str:
    """What an agent's first message begins with; other seeds and sessions get other letters."""
    letters = random.Random(f"{seed}/{session}")
    return "".join(letters.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(4 * page_size)) + "\n"


def _longest(turns: Sequence[ChatTurn]) -> int:
    return max(turn.prompt_tokens + turn.output_tokens for turn in turns)
