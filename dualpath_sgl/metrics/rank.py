"""The metrics of one engine rank.  Their names and labels stand here; docs/operating.md says what is normal.

`prometheus_client` looks once, when it is imported, whether processes share their samples: so it is imported as
late as SGLang imports it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from dualpath_sgl.metrics.helpers import HelperMetrics
from dualpath_sgl.metrics.prompts import Over, Prompts
from scheduler_svc.wire.protocol import Mode, Outcome, Path, RankInfo, Role, Workload

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from dualpath_sgl.lanes.page_load import LaneWork
    from dualpath_sgl.relay.client.counts import Counts

TIME_BUCKETS_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
LANES = ("store", "peer")
"""Each one the source of what it brings."""
UNPLANNED, RELAY = "unplanned", "relay"
"""Paths beside the planned ones: a request that had no plan, and mode relay, which makes none."""
LOCAL_SOURCES = ("device", "host")
MOST_REASONS = 100
"""Further fallback reasons are counted as `other`."""

GAUGES = {
    "sequences": "Requests that this rank was given and has not finished.",
    "tokens": "Tokens of their prompts.",
    "read_queue_bytes": "Bytes to be read from the store and not read yet.",
    "read_rate_bytes_per_s": "Measured rate of the rank's own storage link; 0 while unknown.",
    "host_free_pages": "Free pages of the host pool.",
    "device_free_tokens": "Room for further tokens in device memory.",
    "held": "Requests, pins and promises not let go of; 0 when idle.",
    "kept_pages": "Pages found pinned or lost before a flush; 0, always.",
    "ready_tokens": "To be computed, of requests that wait for their turn only.",
    "compute_rate_tokens_per_s": "Tokens that a prefill engine computes in a second in which it computes.",
}
"""Fields of `Workload`: what the scheduler is told of the rank in its heartbeats."""


class Family(Protocol):
    """A counter, gauge or histogram with the rank's own labels filled in."""

    def __call__(self, *labels: str) -> Any: ...


class RankMetrics:
    """One per rank.  Safe from any thread."""

    def __init__(self, rank: RankInfo, registry: CollectorRegistry | None = None) -> None:
        """`registry`: where it is registered beside SGLang's; None: the process's."""
        from prometheus_client import REGISTRY, Counter, Gauge, Histogram

        from scheduler_svc.telemetry.build import version

        names = ("engine", "role", "rank")
        own = (rank.engine_id, rank.role.value, str(rank.rank))
        to = REGISTRY if registry is None else registry
        self._page_bytes = rank.page_bytes
        self._reasons: set[str] = set()

        def counter(name: str, text: str, *labels: str) -> Family:
            made = Counter(f"dualpath_rank_{name}", text, [*names, *labels], registry=to)
            return lambda *values: made.labels(*own, *values)

        def gauge(name: str, text: str, *labels: str) -> Family:
            made = Gauge(
                f"dualpath_rank_{name}", text, [*names, *labels], registry=to, multiprocess_mode="mostrecent"
            )
            return lambda *values: made.labels(*own, *values)

        def histogram(name: str, text: str, *labels: str) -> Family:
            made = Histogram(
                f"dualpath_rank_{name}", text, [*names, *labels], registry=to, buckets=TIME_BUCKETS_S
            )
            return lambda *values: made.labels(*own, *values)

        about = gauge("info", "What runs here; always 1.", "mode", "version")
        about(rank.mode.value, version()).set(1)
        self.connected = gauge("scheduler_connected", "1 while the scheduler has accepted this rank.")()
        self._gauges = {name: gauge(name, text)() for name, text in GAUGES.items()}
        self.faults = counter("faults", "Exceptions in DualPath's code.")()
        self._requests = counter("requests", "Requests over, by path and outcome.", "path", "outcome")
        self._fallbacks = counter("fallbacks", "Requests that left their plan, by reason.", "reason")
        self._kv_bytes = counter(
            "kv_bytes", "KV of prompts, by path, source and outcome.", "path", "source", "outcome"
        )
        self._prompt_pages = counter("prompt_pages", "Whole pages of the prompts of requests over.")()
        self._needed_pages = counter("needed_pages", "Of them, pages held or stored.")()
        self._pages = counter("pages", "Of needed pages, by where they came from.", "source")
        self._link_bytes = counter("link_bytes", "KV that came over a link, as it came.", "link")
        self._linked: dict[str, int] = {}
        self._queue_seconds = histogram("queue_seconds", "A lane's wait before its first transfer.", "lane")
        self._transfer_seconds = histogram(
            "transfer_seconds", "From a lane's first transfer to the end of its last one.", "lane"
        )
        self._relays_read = rank.mode is Mode.RELAY
        self.helpers = HelperMetrics(counter, self._came)
        self.prompts = Prompts(rank.page_size, self._prompt_over, lanes_tell=not self._relays_read)
        self._begin(rank.role)

    def _begin(self, role: Role) -> None:
        """Every series that is known exists from now on."""
        outcomes = [outcome.value for outcome in Outcome]
        if self._relays_read:
            paths, outcomes, sources = [RELAY], [Outcome.OK.value], ["store", "relay", "peer"]
        else:
            paths, sources = [*(path.value for path in Path), UNPLANNED], [*LANES]
            for lane in LANES:
                self._queue_seconds(lane)
                self._transfer_seconds(lane)
        if role is Role.PREFILL:
            for source in (*LOCAL_SOURCES, *LANES, "recomputed"):
                self._pages(source)
            sources += LOCAL_SOURCES
        for link in ("store", "relay", "peer"):
            self._link_bytes(link)
        for path in paths:
            for outcome in outcomes:
                self._requests(path, outcome)
                for source in sources:
                    self._kv_bytes(path, source, outcome)

    # -- events ------------------------------------------------------------------------------------

    def room_over(
        self, rid: str, path: Path | None, outcome: Outcome, reason: str | None, lanes: Sequence[LaneWork]
    ) -> None:
        """A rank's part in a room has ended.  `path`: as planned; None without a plan."""
        name = UNPLANNED if path is None else path.value
        self._requests(name, outcome.value).inc()
        if reason is not None:
            self._fallback(reason)
        self._lanes_over(rid, name, outcome, lanes)

    def read_unplanned(self, rid: str, lanes: Sequence[LaneWork]) -> None:
        """A load outside of any room has ended."""
        self._lanes_over(rid, UNPLANNED, Outcome.OK, lanes)

    def _lanes_over(self, rid: str, path: str, outcome: Outcome, lanes: Sequence[LaneWork]) -> None:
        for work in lanes:
            record = work.record()
            self._kv_bytes(path, work.lane, outcome.value).inc(record.bytes)
            self.prompts.brought(rid, path, work.lane, record.end_page - record.first_page)
            if work.begun_ns:
                self._queue_seconds(work.lane).observe(record.queue_s)
                self._transfer_seconds(work.lane).observe(record.busy_s)

    def _fallback(self, reason: str) -> None:
        if reason not in self._reasons:
            if len(self._reasons) >= MOST_REASONS:
                reason = "other"
            self._reasons.add(reason)
        self._fallbacks(reason).inc()

    def _prompt_over(self, over: Over) -> None:
        """On SGLang's scheduler thread: what is 0 costs nothing."""
        self._prompt_pages.inc(over.prompt_pages)
        self._needed_pages.inc(over.needed_pages)
        path = RELAY if self._relays_read else over.path
        for source, count in over.pages.items():
            if count:
                self._pages(source).inc(count)
                if source in LOCAL_SOURCES:
                    self._kv_bytes(path, source, Outcome.OK.value).inc(count * self._page_bytes)
        if self._relays_read:
            self._requests(path, Outcome.OK.value).inc()

    def _came(self, source: str, byte_count: int) -> None:
        """Through the relay client.  Elsewhere its calls are a part of what the store lane counts."""
        if self._relays_read:
            self._kv_bytes(RELAY, source, Outcome.OK.value).inc(byte_count)

    # -- what has no moment of its own -------------------------------------------------------------

    def links(self, arrived: Mapping[str, int], counts: Counts | None) -> None:
        """All so far.  `arrived`: by lane; relays take part in what a store lane reads."""
        if counts is None:
            now = dict(arrived)
        else:
            peer = arrived.get("peer", 0) + counts.forwarded_bytes
            now = {"store": counts.own_bytes, "relay": counts.relay_bytes, "peer": peer}
        for link, byte_count in now.items():
            self._link_bytes(link).inc(max(0, byte_count - self._linked.get(link, 0)))
        self._linked = now

    def now(self, workload: Workload) -> None:
        for name, gauge in self._gauges.items():
            gauge.set(getattr(workload, name))


_current: RankMetrics | None = None


def start(rank: RankInfo) -> RankMetrics | None:
    """The process's, made once; None where SGLang exports no metrics."""
    from sglang.srt.runtime_context import get_server_args

    global _current
    if _current is None and get_server_args().enable_metrics:
        _current = RankMetrics(rank)
    return _current


def current() -> RankMetrics | None:
    return _current
