"""How a client stands with a relay: whether it may be asked now, and when to say Hello again."""

from __future__ import annotations

import time

from dualpath_sgl.relay.wire import Welcome

HAIL_S = 0.5
"""Between two Hellos to a relay that has not answered."""
MOST_GREETINGS = 3
"""Of one relay at a time: it may be started again while the memory that it had does not answer."""


class Standing:
    """For one thread."""

    def __init__(self) -> None:
        self.welcome: Welcome | None = None
        """The relay's answer to our last Hello; None while none has come."""
        self._connected = False
        self._met: str | None = None
        """The memory that has answered; another one has to be met before it is read."""
        self._greeting: set[str] = set()
        self._leaving = False
        self._hail_s = 0.0
        self._resume_s = 0.0

    @property
    def may_ask(self) -> bool:
        return (
            self._connected
            and self.welcome is not None
            and self.welcome.mooncake_address == self._met
            and not self._leaving
            and time.monotonic() >= self._resume_s
        )

    def connects(self, connected: bool) -> bool:
        """Whether a connection was lost."""
        lost = self._connected and not connected
        self._connected, self._hail_s = connected, 0.0
        return lost

    def is_time_to_hail(self) -> bool:
        """A Hello is to be said now."""
        now_s = time.monotonic()
        if not self._connected or self.welcome is not None or now_s < self._hail_s:
            return False
        self._hail_s = now_s + HAIL_S
        return True

    def welcomed(self, welcome: Welcome) -> bool:
        """Whether its memory has to be met first (`greeted` must follow)."""
        self.welcome, self._leaving = welcome, False
        if welcome.mooncake_address == self._met or welcome.mooncake_address in self._greeting:
            return False
        if len(self._greeting) == MOST_GREETINGS:
            self.lose(HAIL_S)
            return False
        self._greeting.add(welcome.mooncake_address)
        return True

    def greeted(self, mooncake_address: str, answers: bool, pause_s: float) -> bool:
        """Whether it may be read from now on: it answers, and is the one that the relay has now."""
        self._greeting.discard(mooncake_address)
        if self.welcome is None or self.welcome.mooncake_address != mooncake_address:
            return False
        if answers:
            self._met = mooncake_address
        else:
            self.lose(pause_s)
        return answers

    def knows(self, mooncake_address: str) -> bool:
        return mooncake_address == self._met

    def leaves(self) -> None:
        """The relay wants to be asked for nothing more."""
        self._leaving = True

    def pause(self, pause_s: float) -> None:
        """Ask for nothing for a while."""
        self._resume_s = time.monotonic() + pause_s

    def lose(self, pause_s: float, mooncake_address: str | None = None) -> None:
        """Ask for nothing until it has answered a Hello, which is said after a while.

        `mooncake_address`: of this memory make sure again.
        """
        self.welcome = None
        self._hail_s = self._resume_s = time.monotonic() + pause_s
        if mooncake_address is not None and mooncake_address == self._met:
            self._met = None
