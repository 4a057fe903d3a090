"""Prometheus metrics of a relay."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from dualpath_sgl.relay.readers import Read
from dualpath_sgl.relay.wire import Reason
from scheduler_svc.telemetry import build
from scheduler_svc.telemetry.tally import CounterTally, HistogramTally

READ_BUCKETS_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
READY = "ready"
"""Outcome of a fetch that was not refused."""
RELEASED, LATE, EXPIRED = "released", "late", "expired"
"""Ends of a lease: only what was released in time counts for the client."""
LEASE_ENDS = [(RELEASED,), (LATE,), (EXPIRED,)]

REFUSALS = ("protocol", "no_detail", "accept", "endless")
STEPS = ("the loop", "looking at connections", "handling a message", "a read's end", "beginning reads")
"""In which a fault can be."""


class Metrics:
    """One registry per relay, so that several can live in one process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        build.tell(registry, "relay")
        self.fetches = CounterTally(
            registry,
            "dualpath_relay_fetches",
            "Fetches, by outcome: ready, or why they were refused.",
            ["outcome"],
            [(READY,), *((reason.value,) for reason in Reason)],
        )
        self.leases = CounterTally(
            registry, "dualpath_relay_leases", "Leases that are over, by end.", ["end"], LEASE_ENDS
        )
        self.served_bytes = CounterTally(
            registry,
            "dualpath_relay_served_bytes",
            "Bytes of leases that are over, by end.",
            ["end"],
            LEASE_ENDS,
        )
        self.read_bytes = CounterTally(registry, "dualpath_relay_read_bytes", "Bytes read from the store.")
        self.kept_bytes = CounterTally(
            registry,
            "dualpath_relay_kept_bytes",
            "Bytes that were asked for and lay in the ring, or were on their way there, already.",
        )
        self.objects = CounterTally(
            registry,
            "dualpath_relay_objects",
            "Objects asked of the store: whole, missing (the store's error), or of another size than asked.",
            ["result"],
            [("whole",), ("missing",), ("other_size",)],
        )
        self.read_seconds = HistogramTally(
            registry, "dualpath_relay_read_seconds", "Of one read from the store.", READ_BUCKETS_S
        )
        self.wait_seconds = HistogramTally(
            registry, "dualpath_relay_wait_seconds", "From a fetch to the begin of its read.", READ_BUCKETS_S
        )
        self.queue_bytes = Gauge("dualpath_relay_queue_bytes", "Asked for and not begun.", registry=registry)
        self.free_bytes = Gauge(
            "dualpath_relay_ring_free_bytes", "Of the ring, neither read into nor leased.", registry=registry
        )
        self.leases_open = Gauge("dualpath_relay_leases_open", "Ready and not released.", registry=registry)
        self.hanging = Gauge(
            "dualpath_relay_reads_hanging", "Reads given up and not over.", registry=registry
        )
        self.malformed = Counter(
            "dualpath_relay_malformed", "Messages that were ignored because they are none.", registry=registry
        )
        self.refused_connections = Counter(
            "dualpath_relay_refused_connections",
            "Connections that were refused (protocol, no_detail, accept) or cut (endless).",
            ["reason"],
            registry=registry,
        )
        self.faults = Counter(
            "dualpath_relay_faults",
            "Exceptions in the relay's own code, by step.",
            ["step"],
            registry=registry,
        )
        for reason in REFUSALS:
            self.refused_connections.labels(reason)
        for step in STEPS:
            self.faults.labels(step)

    def serve(self, port: int, host: str) -> int:
        """Answer scrapes; returns the port.  Raises OSError."""
        server, _ = start_http_server(port, addr=host, registry=self.registry)
        return int(server.server_port)

    def read_ended(self, read: Read) -> None:
        self.read_bytes.add(read.got_bytes)
        self.read_seconds.observe(read.ended_s - read.begun_s)
        for got, size in zip(read.got, read.sizes, strict=True):
            self.objects.add(1, "whole" if got == size else "missing" if got < 0 else "other_size")
