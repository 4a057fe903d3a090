"""Exceptions in DualPath's own code: named in the log, counted, and over.

One costs the load, message or hook call that it hit, never the next one, and never SGLang's thread.
The count travels with the heartbeat and is a metric of the scheduler's (`dualpath_engine_faults_total`).
"""

from __future__ import annotations

import logging
import threading

logger = logging.getLogger(__name__)

_lock = threading.Lock()
_count = 0


def record(what: str, *names: object) -> None:
    """Called in an `except` block: `what` (a log format with its `names`) says what it cost."""
    global _count
    with _lock:
        _count += 1
    logger.exception("DualPath: " + what, *names)


def count() -> int:
    """Since the process began."""
    return _count
