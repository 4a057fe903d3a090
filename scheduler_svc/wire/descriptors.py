"""How many connections a process may have."""

from __future__ import annotations

import logging
import resource

logger = logging.getLogger(__name__)


def allow_many_connections() -> None:
    """As many as this process may allow itself: each takes a descriptor, and the usual limit of 1,024 is soon reached
    by clients that say nothing.  Call it before the process listens."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        logger.warning("the limit of %d descriptors stays (%s); raise it with `ulimit -n`", soft, error)
