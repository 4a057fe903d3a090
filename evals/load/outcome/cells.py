"""Cells of the load benchmark: repeated measurements of one thing."""

from __future__ import annotations

import statistics

from pydantic import BaseModel, ConfigDict

GIB = 2**30


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class FaultSeen(Record):
    """What a fault in the middle of a burst met."""

    after_s: float
    """Since the burst began."""
    received_bytes: int
    """By all storage links until then, headers included."""
    rest_bits_per_s: float
    """What the links can bring from then on, together."""


class Sample(Record):
    """One measurement: caches as the cell says, then one burst (or one lone request)."""

    job_s: float
    """JCT; of a lone request its end-to-end time."""
    ttft_s: list[float]
    e2e_s: list[float]
    """Until the last token, of each request."""
    storage_bytes: dict[str, int]
    """Host of a storage link (an engine's name) -> bytes that the link brought, headers included.  A relay uses
    the link of its decode engine."""
    storage_utilisation: dict[str, float] | None
    """Of each link: those bytes over what it could have brought in `job_s`; None: not shaped, or a fault."""
    store_sent_bytes: int
    """By the store node."""
    cpu_s: dict[str, float]
    """Process -> CPU seconds that it and its children took meanwhile."""
    cached_tokens: int
    """Prompt tokens that were not computed."""
    tokens_equal: bool
    """To the answers of the first, cold run of the whole benchmark."""
    planned_read_bytes: int | None = None
    """Read from the store according to the scheduler; None where no scheduler decides."""
    fault: FaultSeen | None = None


class Cell(Record):
    """Repeated measurements of one thing."""

    topology: str
    """`1p2d`: one prefill engine, two decode engines."""
    mode: str
    """`basic`, `both`, `relay` (one relay beside each decode engine), `oracle...` (nothing is read), or the path
    policy of a cluster with decode-side loads."""
    load: str
    """`burst`, `3to1` (the first prefill engine has three quarters of it), `halved` and `killed` (a burst in the
    middle of which a decode engine's storage link loses half of its rate, or a relay dies), `lone`, `alone` (what
    is the second prefill engine's in `3to1`), `resident` (the decode engine still holds the pages), `unshaped` or
    `near_bound` (storage links so fast that `basic` keeps its own only about 85 % busy)."""
    requests: int
    storage_bits_per_s: int | None
    samples: list[Sample]

    @property
    def name(self) -> str:
        return f"{self.topology}/{self.mode}/{self.load}"

    @property
    def job_s(self) -> float:
        return statistics.median(sample.job_s for sample in self.samples)

    @property
    def ttft_s(self) -> float:
        """Median over the samples of the first answer's."""
        return statistics.median(sample.ttft_s[0] for sample in self.samples)

    @property
    def storage_bytes(self) -> float:
        """Over all links, in a measurement."""
        return statistics.median(sum(sample.storage_bytes.values()) for sample in self.samples)

    @property
    def busiest_link(self) -> float | None:
        """Utilisation of the busiest storage link."""
        shares = [
            max(sample.storage_utilisation.values()) for sample in self.samples if sample.storage_utilisation
        ]
        return statistics.median(shares) if shares else None

    def cpu_s(self, process: str) -> float:
        """CPU seconds in a measurement; 0 for a process that this cell's cluster lacks."""
        return statistics.median(sample.cpu_s.get(process, 0.0) for sample in self.samples)


class Goodput(Record):
    """Bytes per second from the decode engine's memory to the prefill engine's, without shaping."""

    size_bytes: int
    forward_bytes_per_s: list[float]
    """A DualPath peer lane's: bytes over busy time, from its `forward` spans."""
    raw_bytes_per_s: list[float]
    """What one `batch_transfer_sync_read` does with as many bytes between the same two namespaces."""
