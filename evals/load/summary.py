"""What the load benchmark found: cells, the figures made of them, and `summary.json`'s schema."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Sample(_Record):
    """One measurement: caches as the cell says, then one burst (or one lone request)."""

    job_s: float
    """JCT; of a lone request its end-to-end time."""
    ttft_s: list[float]
    storage_bytes: dict[str, int]
    """Engine -> bytes that its storage link brought, headers included."""
    storage_utilisation: dict[str, float] | None
    """Engine -> those bytes over what its link could have brought in `job_s`; None: not shaped."""
    store_sent_bytes: int
    """By the store node."""
    cached_tokens: int
    """Prompt tokens that were not computed."""
    tokens_equal: bool
    """To the answers of the first, cold run of the whole benchmark."""
    planned_read_bytes: int | None = None
    """Read from the store according to the scheduler; None where no scheduler decides."""


class Cell(_Record):
    """Repeated measurements of one thing."""

    topology: str
    """`1p2d`: one prefill engine, two decode engines."""
    mode: str
    """`basic`, `both`, `oracle` (nothing is read), or the path policy of a DualPath cluster."""
    load: str
    """`burst`, `lone`, `resident` (the decode engine still holds the pages), `unshaped` or `near_bound`
    (storage links so fast that `basic` keeps its own only about 85 % busy)."""
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
        """Over all engines' links, in a measurement."""
        return statistics.median(sum(sample.storage_bytes.values()) for sample in self.samples)

    @property
    def busiest_link(self) -> float | None:
        """Utilisation of the busiest storage link."""
        shares = [
            max(sample.storage_utilisation.values()) for sample in self.samples if sample.storage_utilisation
        ]
        return statistics.median(shares) if shares else None


class Goodput(_Record):
    """Bytes per second from the decode engine's memory to the prefill engine's, without shaping."""

    size_bytes: int
    forward_bytes_per_s: list[float]
    """A DualPath peer lane's: bytes over busy time, from its `forward` spans."""
    raw_bytes_per_s: list[float]
    """What one `batch_transfer_sync_read` does with as many bytes between the same two namespaces."""

    @property
    def ratio(self) -> float:
        return statistics.median(self.forward_bytes_per_s) / statistics.median(self.raw_bytes_per_s)


class Found(NamedTuple):
    """Everything measured, by `Cell.name`."""

    cells: dict[str, Cell]
    goodput: Goodput | None
    page_bytes: int

    def jct(self, name: str) -> float | None:
        return self.cells[name].job_s if name in self.cells else None

    def ttft(self, name: str) -> float | None:
        return self.cells[name].ttft_s if name in self.cells else None

    def storage_bytes(self, name: str) -> float | None:
        return self.cells[name].storage_bytes if name in self.cells else None

    def load_s(self, mode: str, oracle: str) -> float | None:
        """What loading adds to a lone request's TTFT: TTFT minus that of a request that loads nothing."""
        loaded, resident = self.cells.get(f"1p1d/{mode}/lone"), self.cells.get(f"1p1d/{oracle}/lone")
        return loaded.ttft_s - resident.ttft_s if loaded and resident else None


def _resident_bytes(found: Found) -> int | None:
    """Most bytes of pages read in a measurement: what the scheduler counted or the links carried.

    The links also carry questions to the store's master; only whole pages count.
    """
    samples = [
        sample for name, cell in found.cells.items() if name.endswith("/resident") for sample in cell.samples
    ]
    if not samples:
        return None
    return max(
        max(
            sample.planned_read_bytes or 0,
            sum(sample.storage_bytes.values()) // found.page_bytes * found.page_bytes,
        )
        for sample in samples
    )


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


class Target(NamedTuple):
    """One figure: how it is made of what was measured, and what it should be."""

    what: str
    limit: float | None
    """What physics allows; None: has none."""
    target: float
    at_least: bool
    paper: str
    value: Callable[[Found], float | None]
    """None where its cells are missing."""

    def met(self, value: float) -> bool:
        return value >= self.target if self.at_least else value <= self.target


def _jct(above: str, below: str) -> Callable[[Found], float | None]:
    return lambda found: _ratio(found.jct(above), found.jct(below))


TARGETS = {
    "jct_ratio_1p1d_split": Target(
        "offline JCT basic/split, 1P1D", 2.0, 1.85, True, "1.78", _jct("1p1d/basic/burst", "1p1d/split/burst")
    ),
    "jct_ratio_1p2d_split": Target(
        "offline JCT basic/split, 1P2D", 3.0, 2.6, True, "2.46", _jct("1p2d/basic/burst", "1p2d/split/burst")
    ),
    "jct_ratio_1p1d_shorter_queue": Target(
        "offline JCT basic/shorter_queue, 1P1D",
        2.0,
        1.75,
        True,
        "1.78",
        _jct("1p1d/basic/burst", "1p1d/shorter_queue/burst"),
    ),
    "jct_split_1p1d_over_basic_2p1d": Target(
        "equal storage links: JCT split 1P1D / basic 2P1D",
        1.0,
        1.1,
        False,
        '"equal"',
        _jct("1p1d/split/burst", "2p1d/basic/burst"),
    ),
    "load_ratio_lone_split": Target(
        "lone request, all stored: load time split/basic",
        0.5,
        0.56,
        False,
        "not offered",
        lambda found: _ratio(found.load_s("split", "oracle"), found.load_s("basic", "oracle_upstream")),
    ),
    "ttft_ratio_lone_decode_over_prefill": Target(
        "lone request: TTFT decode/prefill path",
        1.0,
        1.08,
        False,
        "-",
        lambda found: _ratio(found.ttft("1p1d/decode/lone"), found.ttft("1p1d/prefill/lone")),
    ),
    "store_bytes_when_resident": Target(
        "pages forwarded from the decode engine's memory: store bytes read",
        0,
        0,
        False,
        "not offered",
        _resident_bytes,
    ),
    "jct_ratio_not_storage_bound": Target(
        "store not the bottleneck: JCT basic/split",
        None,
        0.98,
        True,
        "-",
        _jct("1p1d/basic/unshaped", "1p1d/split/unshaped"),
    ),
    "forward_goodput_ratio": Target(
        "forward goodput / raw Mooncake read of equal size",
        1.0,
        0.9,
        True,
        "-",
        lambda found: found.goodput.ratio if found.goodput else None,
    ),
    "store_bytes_ratio_both_over_split": Target(
        "store bytes per request both/split",
        2.0,
        1.9,
        True,
        "-",
        lambda found: _ratio(found.storage_bytes("1p1d/both/burst"), found.storage_bytes("1p1d/split/burst")),
    ),
}


class Figure(_Record):
    what: str
    value: float | None
    """None: not measured in this run."""
    target: float
    """At least this where `at_least`, else at most."""
    at_least: bool
    limit: float | None
    paper: str
    met: bool | None


class Details(_Record):
    figures: dict[str, Figure]
    cells: dict[str, Cell]
    goodput: Goodput | None
    storage_bits_per_s: int
    compute_bits_per_s: int | None
    kv_bytes_per_token: int
    prompt_tokens: int
    requests: int
    basic_utilisation: float | None
    """Share of a 1P1D basic run in which the prefill engine's storage link was busy."""
    near_bound_utilisation: float | None
    """The same with the faster storage links of the `near_bound` cells."""
    near_bound_jct_ratio: float | None
    """JCT basic/split there."""
    store_peak_bytes_per_s: float
    """Sent by the store node in its busiest shaped measurement (mean over the measurement)."""
    store_capacity_bytes_per_s: float | None
    """One raw Mooncake read out of the store's namespace, unshaped."""


class LoadSummary(_Record):
    """`summary.json`: the figures of `TARGETS` by name, and what they were made of under `details`."""

    jct_ratio_1p1d_split: float | None
    jct_ratio_1p2d_split: float | None
    jct_ratio_1p1d_shorter_queue: float | None
    jct_split_1p1d_over_basic_2p1d: float | None
    load_ratio_lone_split: float | None
    ttft_ratio_lone_decode_over_prefill: float | None
    store_bytes_when_resident: int | None
    jct_ratio_not_storage_bound: float | None
    forward_goodput_ratio: float | None
    store_bytes_ratio_both_over_split: float | None
    tokens_equal: bool
    details: Details


def figure_values(found: Found) -> dict[str, float | None]:
    """The value of every figure."""
    return {name: target.value(found) for name, target in TARGETS.items()}


def figures(values: dict[str, float | None]) -> dict[str, Figure]:
    return {
        name: Figure(
            what=target.what,
            value=values[name],
            target=target.target,
            at_least=target.at_least,
            limit=target.limit,
            paper=target.paper,
            met=None if (value := values[name]) is None else target.met(value),
        )
        for name, target in TARGETS.items()
    }
