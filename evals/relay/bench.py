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
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any

import psutil
import typer

from dualpath_sgl.evals.relay.world import HOST, MIB, Objects, Prefill, RelayProcess, Store
from dualpath_sgl.launch.processes.ports import FreePorts
from dualpath_sgl.relay.client.prefetch.ahead import CALLS
from dualpath_sgl.relay.wire import Hello
from scheduler_svc.policies.help_policy import Reader, help_for

PAGE = (512 * 1024, 512 * 1024, 64 * 1024)
"""Bytes of a page's k, v and indexer."""
STATES = (2 * MIB,) * 8
SMALL_PAGE = (64 * 1024, 64 * 1024)
"""Of a page's k and v: 128 pages, of which SGLang makes a call, are 16 MiB."""


class Bench:
    def __init__(self, store: Store, rate: float, mib: int, runs: int) -> None:
        self._store, self._rate, self._mib, self._runs = store, rate, mib, runs
        self._cpu_s = 0.0
        """Of this process, in loads."""
        pages = (mib * MIB - sum(STATES)) // sum(PAGE)
        self._sizes = [*PAGE * pages, *STATES]

    def lone(self, relay_count: int) -> dict[str, Any]:
        """One load, with its own link and those of `relay_count` relays."""
        with self._relays(relay_count) as relays, self._prefill(relays) as (prefill, objects):
            self._cpu_s = 0.0
            cpu_before_s = _cpu_s(relays)
            took = [self._timed(prefill, objects) for _ in range(self._runs)]
            cpu_s = _cpu_s(relays) - cpu_before_s
            limit_s = objects.byte_count / self._rate / (relay_count + 1)
            lanes = list(prefill.counts.relays.values())
            gib = max(1, prefill.counts.relay_bytes) / 2**30
            return {
                "relays": relay_count,
                "seconds": _rounded(took),
                "share_of_limit": round(limit_s / statistics.median(took), 3),
                "relay_cpu_s_per_gib": round(cpu_s / gib, 2),
                "engine_cpu_s_per_gib": round(self._cpu_s / (self._runs * objects.byte_count / 2**30), 2),
                "pull_s_per_gib": round(sum(lane.pull_s for lane in lanes) / gib, 3),
                "lost": prefill.counts.lost,
                "given_back": prefill.counts.given_back,
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
            transport = prefill.transport(relays[0])
            read = transport.read
            stopped_s: list[float] = []

            def read_from_the_dead(*arguments: Any) -> bool:
                if not stopped_s and time.monotonic() > begun_s + 0.3:
                    stopped_s.append(time.monotonic())
                    relays[0].send(signal.SIGSTOP)
                return read(*arguments)

            transport.read = read_from_the_dead  # type: ignore[method-assign, assignment]
            begun_s = time.monotonic()
            took_s = self._timed(prefill, objects)
            left = objects.byte_count - 2 * (stopped_s[0] - begun_s) * self._rate
            added_s = took_s - (stopped_s[0] - begun_s) - left / self._rate
            return {
                "seconds": round(took_s, 3),
                "added_s": round(added_s, 3),
                "hung_pulls": prefill.counts.hung_pulls,
                "bounce_kept_back": prefill.loader.kept_back,
            }

    def two_engines(self, parts: int, shares: bool = False) -> dict[str, Any]:
        """Two engines and two relays; the second engine has 1/`parts` of the first one's load.

        `shares`: each has been told its share, as the scheduler would tell it.
        """
        small = self._sizes[: len(self._sizes) // parts]
        with (
            self._relays(2) as relays,
            self._prefill(relays) as (first, many),
            self._prefill(relays, small, "prefill-1") as (second, few),
        ):
            alone_s = self._timed(second, few)
            if shares:
                self._share((first, many), (second, few))
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
            # All four links, or the three that the larger load can have.
            limit_s = max((many.byte_count + few.byte_count) / 4, many.byte_count / 3) / self._rate
            return {
                "large_s": round(ends["large"], 3),
                "small_s": round(ends["small"], 3),
                "small_alone_s": round(alone_s, 3),
                "small_to_alone": round(ends["small"] / alone_s, 2),
                "share_of_limit": round(limit_s / max(ends.values()), 3),
            }

    def _share(self, *engines: tuple[Prefill, Objects]) -> None:
        readers = [
            Reader(str(number), objects.byte_count, self._rate, 0, 0.0)
            for number, (_, objects) in enumerate(engines)
        ]
        helps = help_for(readers)
        for number, (prefill, _) in enumerate(engines):
            relays = prefill.relays
            share = helps[str(number)].share
            relays.replace(relays.helpers, {helper.name: share for helper in relays.helpers})

    def ranks(self, count: int) -> dict[str, Any]:
        """So many ranks load the same objects at a time, as with MLA: what relays read beside one of each."""
        ports = FreePorts(HOST)
        scrapes = [ports.take(), ports.take()]
        with self._relays(2, metrics_ports=scrapes) as relays, ExitStack() as stack:
            first, objects = stack.enter_context(self._prefill(relays, shared=True))
            ranks = [(first, objects)]
            for _ in range(count - 1):
                other = objects.for_another_rank()
                stack.callback(other.free)
                ranks.append(
                    (stack.enter_context(self._prefill(relays, objects=other, shared=True))[0], other)
                )
            took: list[float] = []
            threads = [
                threading.Thread(target=lambda rank=rank: took.append(self._timed(*rank))) for rank in ranks
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            read = sum(_scraped(port, "dualpath_relay_read_bytes_total") for port in scrapes)
            own = sum(prefill.counts.own_bytes for prefill, _ in ranks)
            return {
                "ranks": count,
                "seconds": _rounded(took),
                "share_of_limit": round(objects.byte_count / self._rate / 2 / max(took), 3),
                "read_to_least": round((read + own) / objects.byte_count, 3),
            }

    def calls(self, looks_ahead: bool) -> dict[str, Any]:
        """A load in calls of 16 MiB, with two relays, by SGLang's own prefetch thread with and without our hooks."""
        from sglang.srt.plugins.hook_registry import HookRegistry

        from dualpath_sgl.evals.relay.prefetch import Prefetch
        from dualpath_sgl.relay.client.prefetch import hooks

        if looks_ahead:
            hooks.register(traced=False)
            HookRegistry.apply_hooks()
        sizes = list(SMALL_PAGE) * (self._mib * MIB // sum(SMALL_PAGE))
        pages = len(sizes) // len(SMALL_PAGE)
        with self._relays(2) as relays, self._prefill(relays, sizes) as (prefill, objects):

            def read(some: Sequence[int]) -> int:
                part = slice(some[0] * len(SMALL_PAGE), (some[-1] + 1) * len(SMALL_PAGE))
                wanted = objects.sizes[part]
                got = prefill.loader.load(objects.keys[part], objects.pointers[part], wanted)
                return len(some) if got == wanted else 0

            prefill.load(objects)
            took: list[float] = []
            for _ in range(self._runs):
                objects.forget()
                begun_s = time.monotonic()
                came = Prefetch(read).load(pages)
                took.append(time.monotonic() - begun_s)
                if came != pages or objects.wrong():
                    raise RuntimeError("wrong bytes")
            limit_s = objects.byte_count / self._rate / 3
            return {
                "calls_at_a_time": CALLS if looks_ahead else 1,
                "seconds": _rounded(took),
                "share_of_limit": round(limit_s / statistics.median(took), 3),
            }

    @contextmanager
    def _relays(self, count: int, metrics_ports: list[int] | None = None) -> Iterator[list[RelayProcess]]:
        relays: list[RelayProcess] = []
        try:
            for number in range(count):
                settings: dict[str, object] = {
                    "master": self._store.master,
                    "read_rate_bytes_per_s": self._rate,
                }
                if metrics_ports is None:
                    settings["keep_s"] = 0  # every run reads the same objects
                else:
                    settings["metrics_port"] = metrics_ports[number]
                relays.append(RelayProcess(f"relay-{number}", settings))
            yield relays
        finally:
            for relay in relays:
                relay.end()

    @contextmanager
    def _prefill(
        self,
        relays: list[RelayProcess],
        sizes: list[int] | None = None,
        engine: str = "prefill-0",
        objects: Objects | None = None,
        shared: bool = False,
    ) -> Iterator[tuple[Prefill, Objects]]:
        is_new = objects is None
        objects = objects or Objects(self._store.client, sizes or self._sizes)
        prefill = Prefill(
            self._store.client,
            [relay.helper for relay in relays],
            rate=self._rate,
            hello=Hello(engine=engine),
            is_shared=(lambda key: True) if shared else None,
        )
        try:
            prefill.knows(*relays)
            yield prefill, objects
        finally:
            prefill.end()
            if is_new:
                objects.free()

    def _timed(self, prefill: Prefill, objects: Objects) -> float:
        objects.forget()
        begun_s, begun_cpu_s = time.monotonic(), time.process_time()
        results = prefill.load(objects)
        took_s = time.monotonic() - begun_s
        self._cpu_s += time.process_time() - begun_cpu_s
        if results != objects.sizes or objects.wrong():
            raise RuntimeError("wrong bytes")
        return took_s


def _cpu_s(relays: list[RelayProcess]) -> float:
    """Of the relays' processes, so far."""
    return sum(sum(psutil.Process(relay.process.pid).cpu_times()[:2]) for relay in relays)


def _scraped(port: int, name: str) -> float:
    with urllib.request.urlopen(f"http://{HOST}:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def _rounded(seconds: list[float]) -> list[float]:
    return [round(value, 3) for value in seconds]


def main(
    rate_mbit: Annotated[float, typer.Option(min=1, help="Of every storage link.")] = 320,
    mib: Annotated[int, typer.Option(min=32, help="Of a load.")] = 192,
    runs: Annotated[int, typer.Option(min=1, help="Of each lone load.")] = 3,
    only: Annotated[list[str] | None, typer.Option(help="Cases; all without it.")] = None,
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
            "sglangs_calls": lambda: bench.calls(looks_ahead=False),
            "sglangs_calls_ahead": lambda: bench.calls(looks_ahead=True),
            "ranks_4_of_one_kv": lambda: bench.ranks(4),
            "relay_killed": lambda: bench.killed(signal.SIGKILL),
            "relay_stopped": lambda: bench.killed(signal.SIGSTOP),
            "relay_hung_in_a_pull": bench.hung_in_a_pull,
            "two_engines_equal": lambda: bench.two_engines(1),
            "two_engines_3_to_1": lambda: bench.two_engines(3),
            "two_engines_20_to_1": lambda: bench.two_engines(20),
            "two_engines_equal_shares": lambda: bench.two_engines(1, shares=True),
            "two_engines_3_to_1_shares": lambda: bench.two_engines(3, shares=True),
        }
        measured: dict[str, Any] = {"rate_mbit": rate_mbit, "mib": mib}
        for name, case in cases.items():
            if only and name not in only:
                continue
            measured[name] = {**case(), "load_average": round(os.getloadavg()[0], 1)}
            print(name, measured[name], file=sys.stderr, flush=True)
        print(json.dumps(measured, indent=2))
    finally:
        store.end()
    sys.stdout.flush()
    os._exit(0)  # Mooncake's threads are not waited for


if __name__ == "__main__":
    typer.run(main)
