"""Which engines run, but no longer answer: a thread asks each of them for `/health` now and then.

SGLang answers it when its detokenizer has said something since, and puts a request of one token into
its own queue; the routers ask the same way and more often, so this one costs nothing noticeable.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from dualpath_sgl.launch.supervision.direct_http import answers

INTERVAL_S = 15.0
ANSWER_WITHIN_S = 25.0
"""SGLang itself says no after 20 s."""
SILENT_AFTER_S = 60.0


class EngineWatch:
    """Begins with its context and ends with it, but for a question that is still open."""

    def __init__(
        self,
        urls: Mapping[str, str],
        interval_s: float = INTERVAL_S,
        silent_after_s: float = SILENT_AFTER_S,
    ):
        """`urls`: engine name -> base URL.  All have answered already."""
        self._urls = urls
        self._interval_s = interval_s
        self._silent_after_s = silent_after_s
        self._answered_s = dict.fromkeys(urls, time.monotonic())
        self._over = threading.Event()

    def __enter__(self) -> EngineWatch:
        threading.Thread(target=self._run, name="engine-watch", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()

    def silent(self) -> set[str]:
        """Engines that have not answered for `silent_after_s`."""
        latest_s = time.monotonic() - self._silent_after_s
        return {name for name, answered_s in self._answered_s.items() if answered_s < latest_s}

    def _run(self) -> None:
        with ThreadPoolExecutor(max_workers=len(self._urls), thread_name_prefix="engine-watch") as pool:
            while not self._over.wait(self._interval_s):
                list(pool.map(self._ask, self._urls))

    def _ask(self, name: str) -> None:
        if answers(f"{self._urls[name]}/health", ANSWER_WITHIN_S):
            self._answered_s[name] = time.monotonic()
