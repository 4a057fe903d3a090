"""What the load benchmark measures: which clusters, which cells on each, in which order.

Pure: nothing is started here.  A cluster has two engines of each role where its cells need them; a cell
uses the first ones of them, and as many relays as it has decode engines.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from dualpath_sgl.launch.config.cluster import Mode
from scheduler_svc.wire.protocol import Role

REQUESTS = 10
"""Of a burst."""
UNEVEN_REQUESTS = 8
"""Of a 3 to 1 load: six and two."""
NEAR = "near"
LONE_REPETITIONS = 2
"""Beyond those of a burst: a lone request is short."""
UNSHAPED_REPETITIONS = 10
"""For each one of a burst: without a link to wait for they vary most."""
RELAY = "relay"
CLUSTER_MODES = {"basic": Mode.BASIC, "both": Mode.BOTH, "split": Mode.DECODE_SIDE, RELAY: Mode.RELAY}


class Fault(StrEnum):
    HALVED = "halved"
    """The first decode engine's storage link has half of its rate from then on."""
    KILLED = "killed"
    """The first relay dies."""


class Links(StrEnum):
    SHAPED = "shaped"
    """As the cluster file says."""
    NEAR_BOUND = "near_bound"
    """Storage links that `basic` keeps only about 85 % busy."""
    UNSHAPED = "unshaped"


class Place(NamedTuple):
    """Who serves a request: the index of a prefill and of a decode engine."""

    prefill: int
    decode: int


@dataclass(frozen=True)
class Topology:
    prefill: int
    decode: int

    @property
    def name(self) -> str:
        return f"{self.prefill}p{self.decode}d"


ONE_ONE, ONE_TWO, TWO_ONE, TWO_TWO = Topology(1, 1), Topology(1, 2), Topology(2, 1), Topology(2, 2)


@dataclass(frozen=True)
class CellPlan:
    topology: Topology
    mode: str
    """As in `Cell.mode`."""
    load: str
    """As in `Cell.load`."""
    repetitions: int
    flushed: tuple[Role, ...] = (Role.PREFILL, Role.DECODE)
    """Whose caches are emptied before."""
    links: Links = Links.SHAPED
    fault: Fault | None = None

    @property
    def name(self) -> str:
        return f"{self.topology.name}/{self.mode}/{self.load}"

    @property
    def is_lone(self) -> bool:
        """One request, with the long prompt."""
        return self.load in ("lone", "resident")

    @property
    def places(self) -> list[Place]:
        """Who serves each request; engines of a role take turns, as a router would have it."""
        if self.is_lone:
            return [Place(0, 0)]
        decode = self.topology.decode
        if self.load == "3to1":
            return [Place(int(n % 4 == 3), n % decode) for n in range(UNEVEN_REQUESTS)]
        if self.load == "alone":
            return [Place(1, n % decode) for n in range(UNEVEN_REQUESTS // 4)]
        return [Place(n % self.topology.prefill, n % decode) for n in range(REQUESTS)]

    @property
    def relays(self) -> int:
        return self.topology.decode


Series = tuple[CellPlan, ...]
"""Measured in turns, so that all of them see the machine's good and bad minutes."""


@dataclass(frozen=True)
class ClusterPlan:
    name: str
    mode: Mode
    topology: Topology
    series: tuple[Series, ...]
    forwards: bool = False
    """Forwards out of the decode engine's memory are measured, too."""

    @property
    def cells(self) -> Iterator[CellPlan]:
        for series in self.series:
            yield from series


@dataclass(frozen=True)
class Plan:
    clusters: tuple[ClusterPlan, ...]
    """One after the other."""
    pair: tuple[ClusterPlan, ...] = field(default=())
    """At a time: one series, whose cells have a cluster each, in the same order."""

    @property
    def all_clusters(self) -> tuple[ClusterPlan, ...]:
        return (*self.clusters, *self.pair)

    @property
    def measurements(self) -> int:
        return sum(cell.repetitions for cluster in self.all_clusters for cell in cluster.cells)


def make_plan(repetitions: int, quick: bool) -> Plan:
    """`quick`: 1P1D only, bursts and lone requests of `basic`, `split` and `relay`, each once."""
    if quick:
        return Plan(tuple(_quick(mode) for mode in ("basic", "split", RELAY)))
    return Plan(
        (_basic(repetitions), _decode_side(repetitions), _relay(repetitions), _both()),
        tuple(
            ClusterPlan(
                f"1p1d-{mode}-unshaped",
                CLUSTER_MODES[mode],
                ONE_ONE,
                (
                    (
                        CellPlan(
                            ONE_ONE,
                            mode,
                            "unshaped",
                            UNSHAPED_REPETITIONS * repetitions,
                            links=Links.UNSHAPED,
                        ),
                    ),
                ),
            )
            for mode in ("basic", "split")
        ),
    )


def _quick(mode: str) -> ClusterPlan:
    oracle = {"basic": "oracle_upstream", "split": "oracle", RELAY: "oracle_relay"}[mode]
    series = (
        (CellPlan(ONE_ONE, mode, "burst", 1),),
        (CellPlan(ONE_ONE, mode, "lone", 1),),
        *_nothing_loaded(oracle, 1),
    )
    return ClusterPlan(f"{mode}-quick", CLUSTER_MODES[mode], ONE_ONE, series)


def _basic(repetitions: int) -> ClusterPlan:
    lone = repetitions + LONE_REPETITIONS
    series = (
        (CellPlan(ONE_ONE, "basic", "burst", repetitions),),
        (CellPlan(ONE_ONE, "basic", "lone", lone),),
        *_nothing_loaded("oracle_upstream", repetitions),
        (CellPlan(ONE_ONE, "basic", "near_bound", repetitions, links=Links.NEAR_BOUND),),
        (CellPlan(ONE_TWO, "basic", "burst", repetitions),),
        *_two_prefill("basic", repetitions),
    )
    return ClusterPlan("basic", Mode.BASIC, TWO_TWO, series)


def _decode_side(repetitions: int) -> ClusterPlan:
    lone = repetitions + LONE_REPETITIONS
    series = (
        tuple(CellPlan(ONE_ONE, policy, "burst", repetitions) for policy in ("shorter_queue", "split")),
        (CellPlan(ONE_ONE, "decode", "burst", 1),),
        *_nothing_loaded("oracle", repetitions),
        tuple(CellPlan(ONE_ONE, policy, "lone", lone) for policy in ("prefill", "decode", "split")),
        *(
            (CellPlan(ONE_ONE, policy, "resident", 1, flushed=(Role.PREFILL,)),)
            for policy in ("decode", "split")
        ),
        (CellPlan(ONE_TWO, "split", "burst", repetitions),),
        *_two_prefill("split", repetitions),
        (CellPlan(ONE_ONE, "split", "near_bound", repetitions, links=Links.NEAR_BOUND),),
        (CellPlan(ONE_ONE, "split", "halved", repetitions, fault=Fault.HALVED),),
    )
    return ClusterPlan("decode-side", Mode.DECODE_SIDE, TWO_TWO, series, forwards=True)


def _relay(repetitions: int) -> ClusterPlan:
    lone = repetitions + LONE_REPETITIONS
    series = (
        (CellPlan(ONE_TWO, RELAY, "lone", lone),),
        (CellPlan(ONE_TWO, RELAY, "burst", repetitions),),
        (CellPlan(TWO_TWO, RELAY, "burst", repetitions), CellPlan(TWO_TWO, RELAY, "3to1", repetitions)),
        (CellPlan(TWO_TWO, RELAY, "alone", repetitions),),
        (CellPlan(TWO_ONE, RELAY, "burst", repetitions), CellPlan(TWO_ONE, RELAY, "3to1", repetitions)),
        (CellPlan(ONE_ONE, RELAY, "burst", repetitions),),
        (CellPlan(ONE_ONE, RELAY, "lone", lone),),
        *_nothing_loaded("oracle_relay", repetitions),
        (CellPlan(ONE_ONE, RELAY, "near_bound", repetitions, links=Links.NEAR_BOUND),),
        tuple(CellPlan(ONE_ONE, RELAY, fault.value, repetitions, fault=fault) for fault in Fault),
    )
    return ClusterPlan("relay", Mode.RELAY, TWO_TWO, series)


def _both() -> ClusterPlan:
    # It reads every page twice however often it is asked.
    return ClusterPlan("both", Mode.BOTH, ONE_ONE, ((CellPlan(ONE_ONE, "both", "burst", 1),),))


def _two_prefill(mode: str, repetitions: int) -> tuple[Series, ...]:
    return tuple(
        tuple(CellPlan(topology, mode, load, repetitions) for load in ("burst", "3to1"))
        for topology in (TWO_ONE, TWO_TWO)
    )


def _nothing_loaded(oracle: str, repetitions: int) -> tuple[Series, ...]:
    """Nothing is emptied before: whatever the answers cost besides loading."""
    return (
        (CellPlan(ONE_ONE, oracle, "lone", repetitions + LONE_REPETITIONS, flushed=()),),
        (CellPlan(ONE_ONE, oracle, "burst", repetitions, flushed=()),),
    )
