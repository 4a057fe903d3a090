"""What a lane does about the way Mooncake waits."""

from __future__ import annotations

import os
import threading

WAITING_NICENESS = 10


def wait_politely() -> None:
    """Lower the calling thread's own priority (Linux: niceness belongs to threads).

    Mooncake waits for a transfer by asking again and again, which takes a core for as long as the
    transfer lasts (its issue 1033).  Where cores are few, they are for the threads that compute and copy.
    """
    thread = threading.get_native_id()
    niceness = max(os.getpriority(os.PRIO_PROCESS, thread), WAITING_NICENESS)
    os.setpriority(os.PRIO_PROCESS, thread, niceness)
