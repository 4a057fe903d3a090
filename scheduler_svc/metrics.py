"""Prometheus metrics of the scheduler, fed by the events of `scheduler_svc.state`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from scheduler_svc.state import Event, FallbackSeen, PlanDecided, RankDone

PLAN_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


class Metrics:
    """One registry per server, so that several can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.plans = self._counter("plans", "Rooms planned, by path.", ["path"])
        self.fallbacks = self._counter("fallbacks", "Rooms that left their plan, by reason.", ["reason"])
        self.store_read_bytes = self._counter("store_read_bytes", "Bytes read from the store.", ["engine"])
        self.forwarded_bytes = self._counter(
            "forwarded_bytes", "Bytes read out of a peer's host pool.", ["engine"]
        )
        self.duplicate_store_pages = self._counter(
            "duplicate_store_pages", "Pages of one room that both engines read from the store."
        )
        self.errors = self._counter("scheduler_errors", "Messages answered with an error, by code.", ["code"])
        self.undelivered = self._counter(
            "scheduler_undelivered", "Messages whose receiver was gone or stuck."
        )
        self.rooms_open = Gauge("dualpath_rooms_open", "Rooms not closed yet.", registry=self.registry)
        self.plan_seconds = Histogram(
            "dualpath_plan_seconds",
            "From a room's first report to its plan.",
            buckets=PLAN_BUCKETS_S,
            registry=self.registry,
        )

    def _counter(self, name: str, text: str, labels: list[str] | None = None) -> Counter:
        return Counter(f"dualpath_{name}", text, labels or [], registry=self.registry)

    def __call__(self, event: Event) -> None:
        match event:
            case PlanDecided():
                self.plans.labels(event.plan.path.value).inc()
                self.plan_seconds.observe(event.decided_s - event.first_report_s)
            case FallbackSeen():
                self.fallbacks.labels(event.reason).inc()
            case RankDone():
                self.store_read_bytes.labels(event.engine_id).inc(event.store_read_bytes)
                self.forwarded_bytes.labels(event.engine_id).inc(event.forwarded_bytes)
                self.duplicate_store_pages.inc(event.duplicate_store_pages)

    def serve(self, port: int, host: str) -> int:
        """Answer scrapes on `host:port` from a thread; returns the port (useful with 0)."""
        server, _ = start_http_server(port, addr=host, registry=self.registry)
        return server.server_port
