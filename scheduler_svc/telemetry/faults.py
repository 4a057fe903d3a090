"""Exceptions in the scheduler's own code: named in the log, counted, and over.

Each step of the server's loop, of expiry and of what engines are told to policies is guarded, so
that an exception costs the message or the engine at hand and never the loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from scheduler_svc.telemetry.log_limit import LimitedLog

logger = logging.getLogger(__name__)


class Faults:
    """For one thread."""

    def __init__(self) -> None:
        self.on_fault: Callable[[str], None] = lambda step: None
        """Told the step of each, for metrics."""
        self._log = LimitedLog(logger)

    def record(self, step: str, cost: str) -> None:
        """Called in an `except` block.  Both are words of the source, so there are few kinds of lines."""
        self._log.log(logging.ERROR, f"fault in {step}; {cost}", exc_info=True)
        self.on_fault(step)

    def tick(self) -> None:
        """To be called now and then."""
        self._log.tick()
