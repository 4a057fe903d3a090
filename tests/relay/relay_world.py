"""What one test uses: prefill engines and objects (dualpath_sgl/evals/relay/world.py), and relays that obey."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("MC_LOG_LEVEL", "ERROR")

from dualpath_sgl.evals.relay.world import MIB, WAIT_S, Objects, Prefill, RelayProcess, Store, eventually

PROGRAM = Path(__file__).with_name("relay_program.py")
STORE_BYTES = 512 * MIB
PROMPT = [512 * 1024, 512 * 1024, 64 * 1024] * 24 + [2 * MIB] * 2
"""Bytes of a prompt's objects: k, v and an indexer for each page, then two states; 30 MiB."""
SLOW = 40e6
"""Bytes a second: a prompt takes three quarters of a second on such a link."""


class ObedientRelay(RelayProcess):
    """A real relay whose store can be slowed down and hung (relay_program.py)."""

    def __init__(self, master: str, name: str, rate: float = 0, **settings: object) -> None:
        handle, path = tempfile.mkstemp(prefix="relay-reads-")
        os.close(handle)
        self._read_log = Path(path)
        super().__init__(
            name,
            {"master": master, "ring_bytes": 64 * MIB, **settings},
            [str(PROGRAM)],
            {"RELAY_READ_LOG": path},
        )
        if rate:
            self.tell(f"rate {rate}")

    @property
    def port(self) -> int:
        return int(self.endpoint.rpartition(":")[2])

    def tell(self, command: str) -> None:
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        self.says("obeyed")

    def reads(self) -> list[tuple[str, int]]:
        """Key and result of every object that was asked of the store."""
        lines = self._read_log.read_text().splitlines()
        return [(key, int(count)) for key, count in (line.split() for line in lines)]

    def end(self) -> None:
        super().end()
        self._read_log.unlink(missing_ok=True)


class Loading:
    """A load on a thread of its own."""

    def __init__(self, load: Callable[[], list[int]]) -> None:
        self._results: list[int] | None = None
        self._error: BaseException | None = None
        self.took_s = 0.0
        self._load = load
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        begun_s = time.monotonic()
        try:
            self._results = self._load()
        except BaseException as error:
            self._error = error
        self.took_s = time.monotonic() - begun_s

    @property
    def over(self) -> bool:
        return not self._thread.is_alive()

    def ends(self) -> list[int]:
        self._thread.join(WAIT_S)
        assert self.over, "the load does not end"
        if self._error is not None:
            raise self._error
        return self._results


class Scene:
    """Ended with its test."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._prefills: list[Prefill] = []
        self._ends: list[Callable[[], None]] = []
        self._count = 0

    def relay(self, name: str | None = None, **settings: object) -> ObedientRelay:
        self._count += 1
        relay = ObedientRelay(self.store.master, name or f"relay-{self._count}", **settings)
        self._ends.append(relay.end)
        return relay

    def prefill(self, *relays: RelayProcess, **options: object) -> Prefill:
        """It knows them already."""
        prefill = self.prefill_of([relay.helper for relay in relays], **options)
        prefill.knows(*relays)
        return prefill

    def prefill_of(self, helpers: Sequence[object], **options: object) -> Prefill:
        prefill = Prefill(self.store.client, helpers, **{"bounce_bytes": 32 * MIB, **options})
        self._ends.append(prefill.end)
        self._prefills.append(prefill)
        return prefill

    def objects(self, sizes: Sequence[int] = PROMPT, **options: object) -> Objects:
        objects = Objects(self.store.client, sizes, **options)
        self._ends.append(objects.free)
        return objects

    def for_another_rank(self, objects: Objects) -> Objects:
        other = objects.for_another_rank()
        self._ends.append(other.free)
        return other

    def end(self) -> None:
        for end in reversed(self._ends):
            end()
        for prefill in self._prefills:
            bounce = prefill.loader._bounce
            eventually(
                lambda bounce=bounce: bounce.kept_back or bounce._slots.free_count == bounce._slots.count,
                "bounce memory is nobody's",
            )


@contextmanager
def scene_of(store: Store) -> Iterator[Scene]:
    scene = Scene(store)
    try:
        yield scene
    finally:
        scene.end()
