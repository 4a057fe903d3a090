"""What a lane does about the way Mooncake waits."""

from __future__ import annotations

import logging
import os
import threading

logger = logging.getLogger(__name__)

WAITING_NICENESS = 10


def wait_politely() -> None:
    """Lower the calling thread's own priority (Linux: niceness belongs to threads), where that is allowed.

    Mooncake waits for a transfer by asking again and again, which takes a core for as long as the
    transfer lasts (its issue 1033).  Where cores are few, they are for the threads that compute and copy.
    """
    thread = threading.get_native_id()
    try:
        niceness = max(os.getpriority(os.PRIO_PROCESS, thread), WAITING_NICENESS)
        os.setpriority(os.PRIO_PROCESS, thread, niceness)
    except OSError as error:
        logger.info("DualPath: %s keeps its priority: %s", threading.current_thread().name, error)
