"""One running cluster on shaped links, as the load benchmark sees it: fill the store, then measure."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import psutil
from prometheus_client.parser import text_string_to_metric_families

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.load.client import Burst, Pair, send_to
from dualpath_sgl.evals.load.outcome.cells import FaultSeen, Sample
from dualpath_sgl.evals.load.plan import Place
from dualpath_sgl.evals.load.raw_rates import Place as RawPlace
from dualpath_sgl.evals.load.raw_rates import raw_reads
from dualpath_sgl.evals.spans import jaeger
from dualpath_sgl.launch.config.cluster import Mode
from dualpath_sgl.launch.supervision.cluster import Cluster
from dualpath_sgl.launch.supervision.direct_http import fetch
from dualpath_sgl.launch.topology.network import Network
from dualpath_sgl.launch.topology.plan import STORE, Kind
from scheduler_svc.telemetry.span_names import DECODE_TO_PREFILL
from scheduler_svc.wire.protocol import Role, Status

STORED_BYTES = "master_allocated_bytes"
"""Gauge of mooncake_master."""
STORED_TIMEOUT_S = 60.0
ROOMS_TIMEOUT_S = 10.0
RELAYS_TIMEOUT_S = 30.0
HELPED_SHARE = 0.2
"""A relay that helps brings at least so much of an even share."""
POLL_S = 0.1

Prompts = Sequence[Sequence[int]]


class LoadCluster:
    """`expected` are the answers that every measurement is compared with; None until `warm`."""

    def __init__(self, cluster: Cluster, expected: list[tuple[int, ...]] | None):
        if cluster.network is None:
            raise EvalError("network is missing in the cluster file: give storage_rate and compute_rate")
        self.cluster = cluster
        self.network: Network = cluster.network
        self.expected = expected
        self.storage_bits_per_s: int | None = self.network.plan.link("prefill-0", "storage").bits_per_s
        self._relays_up = set(self._relay_names)

    def warm(self, prompts: Prompts, places: Sequence[Place]) -> bool:
        """Send the prompts to empty engines and wait until the store holds all their pages.

        Returns whether the answers are the expected ones.
        """
        self.shape_storage(None)
        answers = [answer.tokens for answer in self._send(prompts, places).answers]
        if self.expected is None:
            self.expected = answers
        page_size, token_bytes = self.cluster.config.page_size, self.cluster.kv_bytes_per_token
        wanted_bytes = sum(len(prompt) // page_size * page_size for prompt in prompts) * token_bytes
        deadline_s = time.monotonic() + STORED_TIMEOUT_S
        while (stored := self._stored_bytes()) < wanted_bytes:
            if time.monotonic() > deadline_s:
                raise EvalError(
                    f"the store holds {stored:.0f} bytes after {STORED_TIMEOUT_S:g} s, {wanted_bytes} were "
                    "written; is store.segment_bytes large enough?"
                )
            time.sleep(POLL_S)
        return answers == self.expected

    def shape_storage(self, bits_per_s: int | None) -> None:
        """Set the rate of every engine's storage link; None: as fast as it goes."""
        for engine in self.cluster.engines:
            self.network.shape(engine.name, "storage", bits_per_s)
        self.storage_bits_per_s = bits_per_s

    def shape_compute(self, bits_per_s: int | None) -> None:
        for engine in self.cluster.engines:
            self.network.shape(engine.name, "compute", bits_per_s)

    def use_relays(self, count: int, prompt: Sequence[int], number: int, places: Sequence[Place]) -> None:
        """So many relays run from now on, the first ones, and help each prefill engine of `places`.

        `prompt`, the one with that number, is loaded for a look at it.  Raises EvalError when one does not help.
        """
        wanted = set(self._relay_names[:count])
        for name in sorted(self._relays_up - wanted):
            self.cluster.kill(name)
        started = sorted(wanted - self._relays_up)
        for name in started:
            self.cluster.restart(name)
        self._relays_up = wanted
        if not started:
            return
        hosts = [engine.name for engine in self.cluster.engines if engine.role is Role.DECODE][:count]
        for place in {place.prefill: place for place in places}.values():
            deadline_s = time.monotonic() + RELAYS_TIMEOUT_S
            while idle := self._idle_relays(hosts, prompt, number, place):
                if time.monotonic() > deadline_s:
                    raise EvalError(f"relays at {', '.join(idle)} do not help prefill-{place.prefill}")

    def _idle_relays(self, hosts: list[str], prompt: Sequence[int], number: int, place: Place) -> list[str]:
        """Hosts whose relay brought nothing of a load."""
        self.flush()
        read = self.measure([prompt], [place], [number]).storage_bytes
        least = HELPED_SHARE * sum(read.values()) / (1 + len(hosts))
        return [host for host in hosts if read[host] < least]

    def measure(
        self,
        prompts: Prompts,
        places: Sequence[Place],
        numbers: Sequence[int],
        fault: Callable[[], float] | None = None,
        fault_after_s: float = 0.0,
    ) -> Sample:
        """Send the prompts, which have these numbers among those that the store was filled with.

        `fault` is called in the middle of it and returns what the links can bring from then on, bits a second.
        """
        names = [engine.name for engine in self.cluster.engines]
        before = {name: self._received(name) for name in names}
        sent_before = self.network.link_bytes(STORE, "storage").sent
        planned_before = self._planned_read_bytes()
        cpu_before = self._cpu_s()
        seen: list[FaultSeen] = []
        begun_s = time.monotonic()

        def break_it() -> None:
            assert fault is not None, "the timer is only started with one"
            rest_bits_per_s = fault()
            received = sum(self._received(name) - before[name] for name in names)
            after_s = time.monotonic() - begun_s
            seen.append(FaultSeen(after_s=after_s, received_bytes=received, rest_bits_per_s=rest_bits_per_s))

        timer = threading.Timer(fault_after_s, break_it)
        if fault is not None:
            timer.start()
        try:
            burst = self._send(prompts, places)
        finally:
            timer.cancel()
            if fault is not None:
                timer.join()
        if fault is not None and not seen:
            raise EvalError(f"the burst ended after {burst.job_s:.1f} s, before the fault was to happen")
        cpu = self._cpu_s()
        after = {name: self._received(name) for name in names}
        sent = self.network.link_bytes(STORE, "storage").sent - sent_before
        planned = self._planned_read_bytes()
        storage = {name: after[name] - before[name] for name in names}
        assert self.expected is not None, "warm says what is expected"
        return Sample(
            job_s=burst.job_s,
            ttft_s=[answer.ttft_s for answer in burst.answers],
            e2e_s=[answer.e2e_s for answer in burst.answers],
            storage_bytes=storage,
            storage_utilisation=None if seen else self._utilisation(storage, burst),
            store_sent_bytes=sent,
            cpu_s={name: cpu[name] - cpu_before[name] for name in cpu.keys() & cpu_before.keys()},
            cached_tokens=sum(answer.cached_tokens for answer in burst.answers),
            tokens_equal=[answer.tokens for answer in burst.answers]
            == [self.expected[number] for number in numbers],
            planned_read_bytes=None
            if planned is None or planned_before is None
            else planned - planned_before,
            fault=seen[0] if seen else None,
        )

    def halve(self) -> float:
        """The first decode engine's storage link loses half of its rate; what it and the first prefill engine's
        bring together from now on, bits a second."""
        assert self.storage_bits_per_s is not None, "only shaped links are halved"
        self.network.shape("decode-0", "storage", self.storage_bits_per_s // 2)
        return 1.5 * self.storage_bits_per_s

    def kill_relay(self) -> float:
        """The first relay dies; what the first prefill engine's own link brings, bits a second."""
        assert self.storage_bits_per_s is not None, "only shaped links say what is left"
        name = self._relay_names[0]
        self.cluster.kill(name)
        self._relays_up.discard(name)
        return self.storage_bits_per_s

    def flush(self, *roles: Role) -> None:
        """Empty the engines' device and host pools (of some roles); the store keeps everything."""
        self._settled()
        for role in roles or (Role.PREFILL, Role.DECODE):
            self.cluster.flush_caches(role)

    def raw_reads(
        self, reader: str, server: str, kind: Kind, size_bytes: int
    ) -> AbstractContextManager[Callable[[], float]]:
        """Mooncake alone between two members, over their links as they are; see `dualpath_sgl.evals.load.raw_rates`."""
        return raw_reads(self._place(server, kind), self._place(reader, kind), size_bytes)

    @property
    def _relay_names(self) -> list[str]:
        return self.cluster.config.relay_names

    def _place(self, member: str, kind: Kind) -> RawPlace:
        return RawPlace(self.network.plan.link(member, kind).address, partial(self.network.enter, member))

    def _send(self, prompts: Prompts, places: Sequence[Place]) -> Burst:
        return send_to([self._pair(place) for place in places], prompts)

    def _pair(self, place: Place) -> Pair:
        engines = {engine.name: engine for engine in self.cluster.engines}
        prefill = engines[f"{Role.PREFILL}-{place.prefill}"]
        assert prefill.bootstrap_port is not None, "a prefill engine has one"
        return Pair(
            prefill.url,
            self.cluster.addresses.engine(prefill.name).compute,
            prefill.bootstrap_port,
            engines[f"{Role.DECODE}-{place.decode}"].url,
        )

    def _utilisation(self, storage: dict[str, int], burst: Burst) -> dict[str, float] | None:
        if self.storage_bits_per_s is None:
            return None
        possible_bytes = self.storage_bits_per_s / 8 * burst.job_s
        return {name: count / possible_bytes for name, count in storage.items()}

    def _cpu_s(self) -> dict[str, float]:
        """CPU seconds of every process that runs, with its children, so far."""
        return {
            name: _cpu_s(process.pid)
            for name, process in self.cluster.processes.items()
            if process.pid is not None and process.running
        }

    def _received(self, name: str) -> int:
        """Bytes over its storage link so far."""
        return self.network.link_bytes(name, "storage").received

    def _stored_bytes(self) -> float:
        families = text_string_to_metric_families(fetch(self.cluster.master_metrics_url, 10).decode())
        return sum(s.value for family in families for s in family.samples if s.name == STORED_BYTES)

    def _planned_read_bytes(self) -> int | None:
        status = self._settled()
        return None if status is None else sum(engine.store_read_bytes for engine in status.engines)

    def _settled(self) -> Status | None:
        """The scheduler's state once no room is open any more; None where none makes plans."""
        if self.cluster.config.mode is not Mode.DECODE_SIDE:
            return None
        deadline_s = time.monotonic() + ROOMS_TIMEOUT_S
        with self.cluster.ask_scheduler() as client:
            while (status := client.status()).rooms_open and time.monotonic() < deadline_s:
                time.sleep(POLL_S)
        return status


def _cpu_s(pid: int) -> float:
    process = psutil.Process(pid)
    spent_s = 0.0
    for one in (process, *process.children(recursive=True)):
        try:
            spent_s += sum(one.cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue  # it ended just now
    return spent_s


def forward_rates(cluster: Cluster, begun_ns: int, ended_ns: int) -> list[tuple[int, float]]:
    """(bytes, bytes per second) of the forwards that began in the given time (since 1970)."""
    found = []
    for trace in jaeger.traces(jaeger.read_lines(cluster.spans_path)):
        for span in trace["spans"]:
            if (
                span["operationName"] != DECODE_TO_PREFILL
                or not begun_ns <= span["startTime"] * 1000 < ended_ns
            ):
                continue
            tags = {tag["key"]: tag["value"] for tag in span["tags"]}
            byte_count = int(tags["dualpath.bytes"])
            found.append((byte_count, byte_count / (max(span["duration"], 1) / 1e6)))
    return found
