"""Looks at a deployment's counters now and then while a cell runs."""

from __future__ import annotations

import threading
import time

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.matrix.results import Samples
from dualpath_sgl.evals.matrix.target import Target
from dualpath_sgl.launch.topology.network import NetworkError
from scheduler_svc.wire.client import SchedulerError


class Sampler:
    """From entering to leaving the context; `samples` is whole afterwards."""

    def __init__(self, target: Target, every_s: float) -> None:
        self._target = target
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self.samples = Samples(at_s=[], link_bytes={}, read_bytes={}, forwarded_bytes={}, paths={})

    def __enter__(self) -> Sampler:
        self._begun_s = time.perf_counter()
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            self._look()

    def _look(self) -> None:
        """A look that fails is left out: the cell itself says what is wrong with the deployment."""
        at_s = time.perf_counter() - self._begun_s
        try:
            links = self._target.link_bytes()
            counters = self._target.counters()
        except (EvalError, OSError, NetworkError, SchedulerError):
            return
        samples = self.samples
        seen = len(samples.at_s)
        samples.at_s.append(at_s)
        for kept, now in (
            (samples.link_bytes, links),
            (samples.read_bytes, {n: e.store_read_bytes for n, e in counters.engines.items()}),
            (samples.forwarded_bytes, {n: e.forwarded_bytes for n, e in counters.engines.items()}),
            (samples.paths, counters.paths),
        ):
            for name in {**kept, **now}:
                counts = kept.setdefault(name, [0] * seen)
                counts.append(now.get(name, counts[-1] if counts else 0))
