"""One running cluster on shaped links, as the load benchmark sees it: fill the store, then measure."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

from prometheus_client.parser import text_string_to_metric_families

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.load.client import Burst, send
from dualpath_sgl.evals.load.raw_rates import Place, raw_reads
from dualpath_sgl.evals.load.summary import Sample
from dualpath_sgl.evals.spans import jaeger
from dualpath_sgl.launch.config.cluster import Mode
from dualpath_sgl.launch.supervision.cluster import Cluster
from dualpath_sgl.launch.supervision.direct_http import fetch
from dualpath_sgl.launch.topology.network import Network
from dualpath_sgl.launch.topology.plan import STORE, Kind
from scheduler_svc.wire.protocol import Role, Status

STORED_BYTES = "master_allocated_bytes"
"""Gauge of mooncake_master."""
STORED_TIMEOUT_S = 60.0
ROOMS_TIMEOUT_S = 10.0
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
        self.storage_bits_per_s = self.network.plan.link("prefill-0", "storage").bits_per_s

    def warm(self, prompts: Prompts) -> bool:
        """Send the prompts to empty engines and wait until the store holds all their pages.

        Returns whether the answers are the expected ones.
        """
        self.shape_storage(None)
        answers = [answer.tokens for answer in send(self.cluster.url, prompts).answers]
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
        return self._are_expected(answers)

    def _are_expected(self, answers: list[tuple[int, ...]]) -> bool:
        assert self.expected is not None, "warm says what is expected"
        return answers == self.expected[: len(answers)]

    def shape_storage(self, bits_per_s: int | None) -> None:
        """Set the rate of every engine's storage link; None: as fast as it goes."""
        for engine in self.cluster.engines:
            self.network.shape(engine.name, "storage", bits_per_s)
        self.storage_bits_per_s = bits_per_s

    def shape_compute(self, bits_per_s: int | None) -> None:
        for engine in self.cluster.engines:
            self.network.shape(engine.name, "compute", bits_per_s)

    def measure(self, prompts: Prompts) -> Sample:
        """Send the prompts, which are the first ones that the store was filled with."""
        names = [engine.name for engine in self.cluster.engines]
        before = {name: self._received(name) for name in names}
        sent_before = self.network.link_bytes(STORE, "storage").sent
        planned_before = self._planned_read_bytes()
        burst = send(self.cluster.url, prompts)
        after = {name: self._received(name) for name in names}
        sent = self.network.link_bytes(STORE, "storage").sent - sent_before
        planned = self._planned_read_bytes()
        storage = {name: after[name] - before[name] for name in names}
        return Sample(
            job_s=burst.job_s,
            ttft_s=[answer.ttft_s for answer in burst.answers],
            storage_bytes=storage,
            storage_utilisation=self._utilisation(storage, burst),
            store_sent_bytes=sent,
            cached_tokens=sum(answer.cached_tokens for answer in burst.answers),
            tokens_equal=self._are_expected([answer.tokens for answer in burst.answers]),
            planned_read_bytes=None
            if planned is None or planned_before is None
            else planned - planned_before,
        )

    def flush(self, role: Role | None = None) -> None:
        """Empty the engines' device and host pools (of one role); the store keeps everything."""
        self._settled()
        self.cluster.flush_caches(role)

    def raw_reads(
        self, reader: str, server: str, kind: Kind, size_bytes: int
    ) -> AbstractContextManager[Callable[[], float]]:
        """Mooncake alone between two members, over their links as they are; see `dualpath_sgl.evals.load.raw_rates`."""
        return raw_reads(self._place(server, kind), self._place(reader, kind), size_bytes)

    def _place(self, member: str, kind: Kind) -> Place:
        return Place(self.network.plan.link(member, kind).address, partial(self.network.enter, member))

    def _utilisation(self, storage: dict[str, int], burst: Burst) -> dict[str, float] | None:
        if self.storage_bits_per_s is None:
            return None
        possible_bytes = self.storage_bits_per_s / 8 * burst.job_s
        return {name: count / possible_bytes for name, count in storage.items()}

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
        """The scheduler's state once no room is open any more; None without a scheduler."""
        if self.cluster.config.mode is not Mode.DUALPATH:
            return None
        deadline_s = time.monotonic() + ROOMS_TIMEOUT_S
        with self.cluster.ask_scheduler() as client:
            while (status := client.status()).rooms_open and time.monotonic() < deadline_s:
                time.sleep(POLL_S)
        return status


def forward_rates(cluster: Cluster, begun_ns: int, ended_ns: int) -> list[tuple[int, float]]:
    """(bytes, bytes per second) of the `forward` spans that began in the given time (since 1970)."""
    found = []
    for trace in jaeger.traces(jaeger.read_lines(cluster.spans_path)):
        for span in trace["spans"]:
            if span["operationName"] != "forward" or not begun_ns <= span["startTime"] * 1000 < ended_ns:
                continue
            tags = {tag["key"]: tag["value"] for tag in span["tags"]}
            found.append((int(tags["dualpath.bytes"]), float(tags["dualpath.bandwidth_bytes_per_s"])))
    return found
