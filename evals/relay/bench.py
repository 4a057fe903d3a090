"""`python -m dualpath_sgl.evals.relay.bench`: what part of the links' limit a load reaches, as JSON.

Every storage link is imagined (`limits.read_limit`) and has the same rate.  The limit of a load is its bytes
over the rates of the links that may bring them; with a fault, of what they could still bring.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from dualpath_sgl.evals.relay.world import MIB, Objects, Prefill, RelayProcess, Store
from dualpath_sgl.relay.wire import Hello

PAGE = (512 * 1024, 512 * 1024, 64 * 1024)
"""Bytes of a page's k, v and indexer."""
STATES = (2 * MIB,) * 8


class Bench:
    def __init__(self, store: Store, rate: float, mib: int, runs: int) -> None:
        self._store, self._rate, self._runs = store, rate, runs
        pages = (mib * MIB - sum(STATES)) // sum(PAGE)
        self._sizes = [*PAGE * pages, *STATES]

    def lone(self, relay_count: int) -> dict[str, Any]:
        """One load, with its own link and those of `relay_count` relays."""
        with self._relays(relay_count) as relays, self._prefill(relays) as (prefill, objects):
            took = [self._timed(prefill, objects) for _ in range(self._runs)]
            limit_s = objects.byte_count / self._rate / (relay_count + 1)
            lanes = list(prefill.counts.relays.values())
            gib = max(1, prefill.counts.relay_bytes) / 2**30
            return {
                "relays": relay_count,
                "seconds": _rounded(took),
                "share_of_limit": round(limit_s / statistics.median(took), 3),
                "pull_s_per_gib": round(sum(lane.pull_s for lane in lanes) / gib, 3),
                "lost": sum(lane.lost for lane in lanes),
                "given_back": sum(lane.given_back for lane in lanes),
                "copy_s_per_gib": round(sum(lane.copy_s for lane in lanes) / gib, 3),
            }

    def killed(self, number: signal.Signals) -> dict[str, Any]:
        """The one relay gets a signal after a third of its limit."""
        with self._relays(1) as relays, self._prefill(relays) as (prefill, objects):
            both_s = objects.byte_count / self._rate / 2
            after_s = both_s / 3
            timer = threading.Timer(after_s, relays[0].send, [number])
            timer.start()
            took_s = self._timed(prefill, objects)
            left = objects.byte_count - 2 * after_s * self._rate
            return {
                "seconds": round(took_s, 3),
                "share_of_what_was_left": round(left / self._rate / (took_s - after_s), 3),
            }

    def hung_in_a_pull(self) -> dict[str, Any]:
        """The one relay is stopped while a pull is under way, for good."""
        with self._relays(1) as relays, self._prefill(relays) as (prefill, objects):
            read = prefill.loader._forwarder.read
            stopped_s: list[float] = []

            def read_from_the_dead(*arguments: Any) -> bool:
                if not stopped_s and time.monotonic() > begun_s + 0.3:
                    stopped_s.append(time.monotonic())
                    relays[0].send(signal.SIGSTOP)
                return read(*arguments)

            prefill.loader._forwarder.read = read_from_the_dead  # type: ignore[method-assign, assignment]
            begun_s = time.monotonic()
            took_s = self._timed(prefill, objects)
            left = objects.byte_count - 2 * (stopped_s[0] - begun_s) * self._rate
            added_s = took_s - (stopped_s[0] - begun_s) - left / self._rate
            counts = prefill.counts.relays[relays[0].name]
            return {
                "seconds": round(took_s, 3),
                "added_s": round(added_s, 3),
                "hung_pulls": counts.hung_pulls,
                "bounce_kept_back": prefill.loader.kept_back,
            }

    def two_engines(self, parts: int) -> dict[str, Any]:
        """Two engines and two relays; the second engine has 1/`parts` of the first one's load."""
        small = self._sizes[: len(self._sizes) // parts]
        with (
            self._relays(2) as relays,
            self._prefill(relays) as (first, many),
            self._prefill(relays, small, "prefill-1") as (second, few),
        ):
            alone_s = self._timed(second, few)
            ends: dict[str, float] = {}

            def run(name: str, prefill: Prefill, objects: Objects) -> None:
                ends[name] = self._timed(prefill, objects)

            threads = [
                threading.Thread(target=run, args=arguments)
                for arguments in (("large", first, many), ("small", second, few))
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            limit_s = (many.byte_count + few.byte_count) / self._rate / 4
            return {
                "large_s": round(ends["large"], 3),
                "small_s": round(ends["small"], 3),
                "small_alone_s": round(alone_s, 3),
                "small_to_alone": round(ends["small"] / alone_s, 2),
                "share_of_limit": round(limit_s / max(ends.values()), 3),
            }

    @contextmanager
    def _relays(self, count: int) -> Iterator[list[RelayProcess]]:
        relays: list[RelayProcess] = []
        try:
            for number in range(count):
                settings: dict[str, object] = {
                    "master": self._store.master,
                    "read_rate_bytes_per_s": self._rate,
                    "keep_s": 0,
                }
                relays.append(RelayProcess(f"relay-{number}", settings))
            yield relays
        finally:
            for relay in relays:
                relay.end()

    @contextmanager
    def _prefill(
        self, relays: list[RelayProcess], sizes: list[int] | None = None, engine: str = "prefill-0"
    ) -> Iterator[tuple[Prefill, Objects]]:
        objects = Objects(self._store.client, sizes or self._sizes)
        prefill = Prefill(
            self._store.client,
            [relay.helper for relay in relays],
            rate=self._rate,
            hello=Hello(engine=engine),
        )
        try:
            prefill.knows(*relays)
            yield prefill, objects
        finally:
            prefill.end()
            objects.free()

    def _timed(self, prefill: Prefill, objects: Objects) -> float:
        objects.forget()
        begun_s = time.monotonic()
        results = prefill.load(objects)
        took_s = time.monotonic() - begun_s
        if results != objects.sizes or objects.wrong():
            raise RuntimeError("wrong bytes")
        return took_s


def _rounded(seconds: list[float]) -> list[float]:
    return [round(value, 3) for value in seconds]


def bench(
    rate_mbit: Annotated[float, typer.Option(min=1, help="Of every storage link.")] = 320,
    mib: Annotated[int, typer.Option(min=32, help="Of a load.")] = 192,
    runs: Annotated[int, typer.Option(min=1, help="Of each lone load.")] = 3,
) -> None:
    """Measure relays on imagined links and print what part of the limit they reach."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    store = Store(3 * mib * MIB)
    try:
        bench = Bench(store, rate_mbit * 1e6 / 8, mib, runs)
        cases: dict[str, Callable[[], dict[str, Any]]] = {
            "one_link": lambda: bench.lone(0),
            "two_links": lambda: bench.lone(1),
            "three_links": lambda: bench.lone(2),
            "relay_killed": lambda: bench.killed(signal.SIGKILL),
            "relay_stopped": lambda: bench.killed(signal.SIGSTOP),
            "relay_hung_in_a_pull": bench.hung_in_a_pull,
            "two_engines_equal": lambda: bench.two_engines(1),
            "two_engines_3_to_1": lambda: bench.two_engines(3),
            "two_engines_20_to_1": lambda: bench.two_engines(20),
        }
        measured: dict[str, Any] = {"rate_mbit": rate_mbit, "mib": mib}
        for name, case in cases.items():
            measured[name] = {**case(), "load_average": round(os.getloadavg()[0], 1)}
            print(name, measured[name], file=sys.stderr, flush=True)
        print(json.dumps(measured, indent=2))
    finally:
        store.end()
    sys.stdout.flush()
    os._exit(0)  # Mooncake's threads are not waited for


if __name__ == "__main__":
    typer.run(bench)
