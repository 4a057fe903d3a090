"""How many prompt tokens an engine retires per second, from what it says it has to do.

Between two heartbeats an engine retires

    tokens before + tokens that arrived - tokens now

Only spans in which it was never idle count, so that the rate is what it can do and not what it
was asked to do.  Tokens are those of whole prompts, hits included: the same as in `Workload.tokens`.
"""

from __future__ import annotations

MIN_SPAN_S = 1.0
"""Busy time in one sample; a long prefill retires nothing for many heartbeats, then all at once."""

WEIGHT = 0.2
"""How much the newest sample counts in the moving average."""


class TokenRate:
    __slots__ = ("_arrived", "_busy_s", "_last_s", "_last_tokens", "_retired", "per_s")

    def __init__(self) -> None:
        self.per_s = 0.0
        """0 while unknown."""
        self._last_tokens = 0
        self._last_s = 0.0
        self._arrived = 0
        self._busy_s = 0.0
        self._retired = 0

    def arrived(self, tokens: int) -> None:
        self._arrived += tokens

    def heartbeat(self, tokens: int, now_s: float) -> None:
        """The engine has `tokens` to do now."""
        if self._last_tokens and tokens:
            self._busy_s += now_s - self._last_s
            self._retired += self._last_tokens + self._arrived - tokens
            if self._busy_s >= MIN_SPAN_S and self._retired > 0:
                sample = self._retired / self._busy_s
                self.per_s += (WEIGHT if self.per_s else 1.0) * (sample - self.per_s)
                self._busy_s, self._retired = 0.0, 0
        else:
            self._busy_s, self._retired = 0.0, 0
        self._last_tokens, self._last_s, self._arrived = tokens, now_s, 0
