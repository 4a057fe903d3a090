"""The prompts of one session, built turn by turn from what was really generated."""

from __future__ import annotations

import random

from dualpath_sgl.evals.agents.workload import SessionPlan


class Conversation:
    """One agent's side of a session: `prompt()` and `answer()` alternate, once per turn.

    New tokens are drawn from `range(vocab_size)`, seeded by (seed, session id, turn), so the same
    answers always lead to the same prompts.
    """

    def __init__(self, plan: SessionPlan, vocab_size: int, seed: int):
        self.plan = plan
        self._vocab_size = vocab_size
        self._seed = seed
        self._prompts: list[list[int]] = []
        self._answers: list[list[int]] = []

    def prompt(self) -> list[int]:
        """Token ids of the next turn's prompt, `plan.turns[i].prompt_tokens` long."""
        index = len(self._prompts)
        turn = self.plan.turns[index]
        context: list[int] = []
        if turn.parent is not None:
            context = self._prompts[turn.parent][: turn.kept_tokens]
            if turn.keeps_answer:
                context = context + self._answers[turn.parent]
        prompt = context + self._new_tokens(index, context, turn.new_tokens)
        self._prompts.append(prompt)
        return prompt

    def answer(self, tokens: list[int]) -> None:
        """Record what was generated for the last prompt.  Raises ValueError on a wrong length."""
        index = len(self._answers)
        wanted = self.plan.turns[index].output_tokens
        if len(tokens) != wanted:
            raise ValueError(
                f"session {self.plan.id} turn {index}: {len(tokens)} tokens were generated, "
                f"{wanted} asked for"
            )
        self._answers.append(list(tokens))

    def _new_tokens(self, index: int, context: list[int], count: int) -> list[int]:
        rng = random.Random(f"{self._seed}/{self.plan.id}/{index}")
        tokens = [rng.randrange(self._vocab_size) for _ in range(count)]
        # By chance the first new token may continue an earlier turn: then more would be shared
        # than the trace says.
        place = len(context)
        taken = {
            transcript[place]
            for transcript in map(list.__add__, self._prompts, self._answers)
            if len(transcript) > place and transcript[:place] == context
        }
        while tokens[0] in taken:
            tokens[0] = (tokens[0] + 1) % self._vocab_size
        return tokens
