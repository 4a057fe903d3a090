"""A real relay whose store a test can slow down, hang and stop asking, by lines on its standard input.

rate N    reads take as long as over a link of N bytes a second, from now on; 0: of no limit
hang      reads begun from now on do not return
go        they do again, and those that hang
"""

from __future__ import annotations

import os
import sys
import threading
import time

from dualpath_sgl.limits.read_limit import ReadLimit
from dualpath_sgl.relay.__main__ import serve
from dualpath_sgl.relay.settings import load
from dualpath_sgl.relay.store import Store


class ObedientStore:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._limit: ReadLimit | None = None
        self._may_return = threading.Event()
        self._may_return.set()
        self._log = open(os.environ["RELAY_READ_LOG"], "w")  # noqa: SIM115 - for as long as the process lives
        threading.Thread(target=self._obey, daemon=True).start()

    def read(self, keys: list[str], addresses: list[int], sizes: list[int]) -> list[int]:
        begun_s = time.monotonic()
        got = self._store.read(keys, addresses, sizes)
        self._log.write("".join(f"{key} {count}\n" for key, count in zip(keys, got, strict=True)))
        self._log.flush()
        if self._limit is not None:
            self._limit.pace(sum(count for count in got if count > 0), begun_s)
        self._may_return.wait()
        return got

    def _obey(self) -> None:
        for line in sys.stdin:
            command, *rest = line.split()
            if command == "rate":
                self._limit = ReadLimit(float(rest[0])) if float(rest[0]) else None
            elif command == "hang":
                self._may_return.clear()
            elif command == "go":
                self._may_return.set()
            print("obeyed", flush=True)


serve(load(), ObedientStore)
os._exit(0)
