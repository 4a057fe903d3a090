"""Exceptions in DualPath's own code: named in the log, counted, and over.

One costs the load, message or hook call that it hit, never the next one, and never SGLang's thread.
The count travels with the heartbeat and is a metric of the scheduler's (`dualpath_engine_faults_total`).
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from typing import Any, Protocol

logger = logging.getLogger(__name__)

_lock = threading.Lock()
_count = 0


class Log(Protocol):
    """A logger, or one that limits what it writes (`LimitedLog`)."""

    def log(self, level: int, text: str, /, *arguments: object, exc_info: bool) -> None: ...


def record(what: str, *names: object, log: Log = logger) -> None:
    """Called in an `except` block: `what` (a log format with its `names`) says what it cost."""
    global _count
    with _lock:
        _count += 1
    log.log(logging.ERROR, "DualPath: " + what, *names, exc_info=True)


def guarded(hook: Callable) -> Callable:
    """`hook`, whose exceptions end in it: SGLang's scheduler loop, which catches nothing, must not end by one."""

    @functools.wraps(hook)
    def without_harm(*args: Any, **kwargs: Any) -> Any:
        try:
            return hook(*args, **kwargs)
        except Exception:
            record("%s failed; SGLang goes on without it", hook.__name__)
            return None

    return without_harm


def count() -> int:
    """Since the process began."""
    return _count
