"""What decode engines say that they hold, as a prefill engine remembers it for a while.

They are asked when SGLang asks the store what it has of a prompt, a moment before it loads.  What is
remembered decides only who is asked first: nothing depends on its being true any more.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from dualpath_sgl.relay.wire import MOST_ASKED, MOST_KEY_CHARACTERS, Held, Holds

ANSWER_S = 0.02
"""Nobody waits longer for an answer; one that comes later is good for the load itself."""
FRESH_S = 30.0
"""What was said longer ago is not believed."""
MOST_KEYS = 200_000
"""Remembered; the ones heard of first go first."""

_numbers = itertools.count(1)


@dataclass(eq=False)
class _Question:
    keys: Sequence[str]
    asked_s: float
    open: set[str] = field(default_factory=set)
    """Who has not answered."""


class Whereabouts:
    """Any thread may call anything."""

    def __init__(self) -> None:
        self._questions: dict[int, _Question] = {}
        self._holders: OrderedDict[str, dict[str, float]] = OrderedDict()
        """Of each key, who holds it and when that was said."""
        self._change = threading.Condition()

    def ask(self, keys: Sequence[str], engines: Sequence[str]) -> list[Holds]:
        """The questions that are to be sent to each of `engines` now."""
        asked = [key for key in keys if len(key) <= MOST_KEY_CHARACTERS]
        questions = []
        now_s = time.monotonic()
        with self._change:
            for number in [n for n, old in self._questions.items() if now_s > old.asked_s + FRESH_S]:
                del self._questions[number]
            for first in range(0, len(asked), MOST_ASKED):
                piece = asked[first : first + MOST_ASKED]
                question = Holds(next(_numbers), tuple(piece))
                self._questions[question.question] = _Question(piece, now_s, set(engines))
                questions.append(question)
        return questions

    def heard(self, engine: str, held: Held) -> None:
        """An answer that nobody waits for is no answer."""
        now_s = time.monotonic()
        with self._change:
            question = self._questions.get(held.question)
            if question is None or engine not in question.open:
                return
            question.open.discard(engine)
            if not question.open:
                del self._questions[held.question]
            there = {position for first, count in held.runs for position in range(first, first + count)}
            for position, key in enumerate(question.keys):
                if position in there:
                    self._holders.setdefault(key, {})[engine] = now_s
                    self._holders.move_to_end(key)
                elif key in self._holders:
                    self._holders[key].pop(engine, None)
            while len(self._holders) > MOST_KEYS:
                self._holders.popitem(last=False)
            self._change.notify_all()

    def settle(self) -> None:
        """Wait for answers that may come any moment."""
        with self._change:
            asked = list(self._questions)
            self._change.wait_for(
                lambda: self._questions.keys().isdisjoint(asked), timeout=self._patience_s()
            )

    def holders(self, key: str) -> list[str]:
        """Who said lately that it holds the object."""
        since_s = time.monotonic() - FRESH_S
        with self._change:
            said = self._holders.get(key, {})
            return [engine for engine, said_s in said.items() if said_s >= since_s]

    def _patience_s(self) -> float:
        newest_s = max((question.asked_s for question in self._questions.values()), default=0.0)
        return max(0.0, newest_s + ANSWER_S - time.monotonic())
