"""The load benchmark's figures: how each is made of cells, and what it should be."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dualpath_sgl.evals.load.outcome.cells import GIB, Cell, Goodput, Record


class Value(NamedTuple):
    """`low` and `high` are the least and the most that single measurements give."""

    value: float
    low: float
    high: float
    repetitions: int
    """Measurements of the cell that has fewer."""


class Found(NamedTuple):
    """Everything measured, by `Cell.name`."""

    cells: dict[str, Cell]
    goodput: Goodput | None
    page_bytes: int

    def jct(self, name: str) -> list[float]:
        return [sample.job_s for sample in self._samples(name)]

    def ttft(self, name: str) -> list[float]:
        return [sample.ttft_s[0] for sample in self._samples(name)]

    def storage_bytes(self, name: str) -> list[float]:
        return [sum(sample.storage_bytes.values()) for sample in self._samples(name)]

    def load_s(self, name: str, oracle: str) -> list[float]:
        """What loading adds to a lone request's TTFT: TTFT minus that of a request that loads nothing."""
        nothing = self.ttft(oracle)
        return [ttft_s - statistics.median(nothing) for ttft_s in self.ttft(name)] if nothing else []

    def _samples(self, name: str):
        return self.cells[name].samples if name in self.cells else []


def ratio(above: Sequence[float], below: Sequence[float]) -> Value | None:
    """Of medians; None where one of them was not measured."""
    if not above or not below:
        return None
    return Value(
        statistics.median(above) / statistics.median(below),
        min(above) / max(below),
        max(above) / min(below),
        min(len(above), len(below)),
    )


class Target(NamedTuple):
    """One figure: how it is made of what was measured, and what it should be."""

    what: str
    limit: float | None
    """What physics allows; None: has none."""
    target: float
    at_least: bool
    paper: str
    value: Callable[[Found], Value | None]
    """None where its cells are missing."""

    def met(self, value: float) -> bool:
        return value >= self.target if self.at_least else value <= self.target


def _jct(above: str, below: str) -> Callable[[Found], Value | None]:
    return lambda found: ratio(found.jct(above), found.jct(below))


def _lone(loaded: str, oracle: str) -> Callable[[Found], Value | None]:
    """Load time beside that of `basic`."""
    return lambda found: ratio(
        found.load_s(loaded, oracle), found.load_s("1p1d/basic/lone", "1p1d/oracle_upstream/lone")
    )


def _resident_bytes(found: Found) -> Value | None:
    """Most bytes of pages read in a measurement: what the scheduler counted or the links carried.

    The links also carry questions to the store's master; only whole pages count.
    """
    read = [
        max(
            sample.planned_read_bytes or 0,
            sum(sample.storage_bytes.values()) // found.page_bytes * found.page_bytes,
        )
        for name, cell in found.cells.items()
        if name.endswith("/resident")
        for sample in cell.samples
    ]
    return Value(max(read), min(read), max(read), len(read)) if read else None


def _rest(faulty: str, whole: str) -> Callable[[Found], Value | None]:
    """Share of what the links could still do: the time that the rest of a burst needs at least, over that it took.

    `whole` is the same burst without a fault: it says how much there is to read.
    """

    def value(found: Found) -> Value | None:
        if faulty not in found.cells or whole not in found.cells:
            return None
        shares = []
        for sample in found.cells[faulty].samples:
            assert sample.fault is not None, f"{faulty} is a cell with a fault"
            left_bytes = found.cells[whole].storage_bytes - sample.fault.received_bytes
            least_s = left_bytes * 8 / sample.fault.rest_bits_per_s
            shares.append(least_s / (sample.job_s - sample.fault.after_s))
        return ratio(shares, [1.0] * len(shares))

    return value


def _small_load(found: Found) -> Value | None:
    """The second prefill engine's part of a 3 to 1 load, beside the time it takes alone."""
    cell = found.cells.get("2p2d/relay/3to1")
    if cell is None:
        return None
    ends = [max(sample.e2e_s[3::4]) for sample in cell.samples]
    return ratio(ends, found.jct("2p2d/relay/alone"))


def _goodput(found: Found) -> Value | None:
    if found.goodput is None:
        return None
    return ratio(found.goodput.forward_bytes_per_s, found.goodput.raw_bytes_per_s)


MAIN = {
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
        _lone("1p1d/split/lone", "1p1d/oracle/lone"),
    ),
    "ttft_ratio_lone_decode_over_prefill": Target(
        "lone request: TTFT decode/prefill path",
        1.0,
        1.08,
        False,
        "-",
        lambda found: ratio(found.ttft("1p1d/decode/lone"), found.ttft("1p1d/prefill/lone")),
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
        "forward goodput / raw Mooncake read of equal size", 1.0, 0.9, True, "-", _goodput
    ),
    "store_bytes_ratio_both_over_split": Target(
        "store bytes per request both/split",
        2.0,
        1.9,
        True,
        "-",
        lambda found: ratio(found.storage_bytes("1p1d/both/burst"), found.storage_bytes("1p1d/split/burst")),
    ),
    "jct_ratio_1p1d_relay": Target(
        "offline JCT basic/relay, 1P1D and one relay",
        2.0,
        1.95,
        True,
        "-",
        _jct("1p1d/basic/burst", "1p1d/relay/burst"),
    ),
    "jct_ratio_1p2d_relay": Target(
        "offline JCT basic/relay, 1P2D and two relays",
        3.0,
        2.85,
        True,
        "-",
        _jct("1p2d/basic/burst", "1p2d/relay/burst"),
    ),
    "load_ratio_lone_relay": Target(
        "lone request: load time relay/basic, one relay",
        0.5,
        0.5 / 0.96,
        False,
        "-",
        _lone("1p1d/relay/lone", "1p1d/oracle_relay/lone"),
    ),
    "load_ratio_lone_two_relays": Target(
        "lone request: load time relay/basic, two relays",
        1 / 3,
        1 / 3 / 0.94,
        False,
        "-",
        _lone("1p2d/relay/lone", "1p1d/oracle_relay/lone"),
    ),
}
"""They stand at the top of `summary.json`."""

OF_RATES = 0.93
"""What a faulty or uneven load should reach of what its links can do."""


def _uneven(topology: str, load: str, mode: str, limit: float) -> Target:
    what = {"burst": "equal loads", "3to1": "loads 3 to 1"}[load]
    return Target(
        f"JCT basic/{mode}, {topology.upper()}, {what}",
        limit,
        round(OF_RATES * limit, 3),
        True,
        "-",
        _jct(f"{topology}/basic/{load}", f"{topology}/{mode}/{load}"),
    )


# Limits: bytes over the rates of the links that may bring them.  2P2D has four links for `split` and relays, two
# for `basic`; of a 3 to 1 load `basic` reads three quarters over one link.
MORE = {
    f"jct_ratio_{topology}_{load}_{mode}": _uneven(topology, load, mode, limit)
    for topology, load, limit in (
        ("2p2d", "burst", 2.0),
        ("2p2d", "3to1", 3.0),
        ("2p1d", "burst", 1.5),
        ("2p1d", "3to1", 2.0),
    )
    for mode in ("split", "relay")
} | {
    "small_load_relay_over_alone": Target(
        "loads 3 to 1, 2P2D: the small one's JCT beside alone", 1.0, 1.3, False, "-", _small_load
    ),
    "rest_share_halved_split": Target(
        "a link halved in mid-burst, split: share of what is left",
        1.0,
        OF_RATES,
        True,
        "-",
        _rest("1p1d/split/halved", "1p1d/split/burst"),
    ),
    "rest_share_halved_relay": Target(
        "a link halved in mid-burst, relay: share of what is left",
        1.0,
        OF_RATES,
        True,
        "-",
        _rest("1p1d/relay/halved", "1p1d/relay/burst"),
    ),
    "rest_share_killed_relay": Target(
        "the relay killed in mid-burst: share of what is left",
        1.0,
        OF_RATES,
        True,
        "-",
        _rest("1p1d/relay/killed", "1p1d/relay/burst"),
    ),
}
"""They stand among the details only."""

TARGETS = MAIN | MORE


class Figure(Record):
    what: str
    value: float | None
    """None: not measured in this run."""
    low: float | None
    """The least that single measurements give; of one ratio's, the least above over the most below."""
    high: float | None
    repetitions: int
    target: float
    """At least this where `at_least`, else at most."""
    at_least: bool
    limit: float | None
    paper: str
    met: bool | None


def figures(found: Found) -> dict[str, Figure]:
    """Every figure by name."""
    return {name: _figure(target, target.value(found)) for name, target in TARGETS.items()}


def _figure(target: Target, value: Value | None) -> Figure:
    return Figure(
        what=target.what,
        value=value.value if value else None,
        low=value.low if value else None,
        high=value.high if value else None,
        repetitions=value.repetitions if value else 0,
        target=target.target,
        at_least=target.at_least,
        limit=target.limit,
        paper=target.paper,
        met=target.met(value.value) if value else None,
    )


BUSY_CELLS = {"basic": "oracle_upstream", "split": "oracle", "relay": "oracle_relay"}
"""Mode -> the cell that says what a burst costs without loading."""


def cpu_s_per_gib(cells: dict[str, Cell]) -> dict[str, dict[str, float]]:
    """Mode -> process -> CPU seconds of loading a GiB, in 1P1D bursts, less those of a burst that loads nothing.

    Waiting counts: Mooncake waits by asking again and again, as long as a link takes.
    """
    found = {}
    for mode, nothing in BUSY_CELLS.items():
        burst, oracle = cells.get(f"1p1d/{mode}/burst"), cells.get(f"1p1d/{nothing}/burst")
        if burst is not None and oracle is not None:
            processes = sorted({name for sample in burst.samples for name in sample.cpu_s})
            found[mode] = {
                name: (burst.cpu_s(name) - oracle.cpu_s(name)) / (burst.storage_bytes / GIB)
                for name in processes
            }
    return found
