"""Which cells stand beside each other: all modes that did the same work on the same topology."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from dualpath_sgl.evals.common.imbalance import max_over_mean
from dualpath_sgl.evals.common.nearest_rank import nearest_rank
from dualpath_sgl.evals.matrix.results import CellResult, Request


class Group(NamedTuple):
    """All repetitions of one cell."""

    cells: tuple[CellResult, ...]

    @property
    def first(self) -> CellResult:
        return self.cells[0]

    @property
    def mode(self) -> str:
        return self.first.mode

    @property
    def job_s(self) -> float:
        """Median over the repetitions, as everything here."""
        return statistics.median(cell.job_s for cell in self.cells)

    @property
    def limit_s(self) -> float | None:
        found = [cell.storage_limit_s for cell in self.cells if cell.storage_limit_s is not None]
        return statistics.median(found) if found else None

    @property
    def requests(self) -> list[Request]:
        """Of all repetitions."""
        return [request for cell in self.cells for request in cell.requests]

    @property
    def requests_per_s(self) -> float:
        return statistics.median(len(cell.requests) / cell.job_s for cell in self.cells if cell.job_s)

    @property
    def hit_rate(self) -> float:
        return statistics.median(cell.hit_rate for cell in self.cells)

    @property
    def theoretical_hit_rate(self) -> float:
        return statistics.median(cell.theoretical_hit_rate for cell in self.cells)

    @property
    def read_bytes(self) -> dict[str, float]:
        """Engine -> bytes read from the store."""
        return {
            name: statistics.median(cell.read_bytes.get(name, 0) for cell in self.cells)
            for name in self.first.read_bytes
        }

    @property
    def forwarded_bytes(self) -> float:
        return statistics.median(
            sum(engine.forwarded_bytes for engine in cell.engines.values()) for cell in self.cells
        )

    @property
    def imbalance(self) -> float | None:
        """Bytes of the engine that read most over the mean of all; None: nothing was read."""
        reads = self.read_bytes
        return max_over_mean(reads.values()) if sum(reads.values()) else None

    @property
    def utilisation(self) -> dict[str, float]:
        """Engine -> share of the run in which its storage link was busy; empty where no rate is known."""
        return {
            name: statistics.median(share[name] for share in map(utilisation, self.cells) if name in share)
            for name in utilisation(self.first)
        }

    @property
    def tokens_equal(self) -> bool | None:
        told = [cell.tokens_equal for cell in self.cells if cell.tokens_equal is not None]
        return all(told) if told else None

    @property
    def paths(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for cell in self.cells:
            for path, count in cell.paths.items():
                found[path] = found.get(path, 0) + count
        return found

    @property
    def fallbacks(self) -> int:
        return sum(sum(cell.fallbacks.values()) for cell in self.cells)

    def quantile_s(self, field: str, share: float) -> float | None:
        """Of `ttft_s`, `ttst_s`, `tpot_s` or `e2e_s` (nearest rank); None without a value."""
        values = self.values_s(field)
        return nearest_rank(values, share) if values else None

    def mean_s(self, field: str) -> float | None:
        values = self.values_s(field)
        return statistics.fmean(values) if values else None

    def values_s(self, field: str) -> list[float]:
        found = (getattr(request, field) for request in self.requests)
        return sorted(value for value in found if value is not None)


def carried(cell: CellResult) -> dict[str, list[int]]:
    """Engine -> bytes that its storage link has brought, by sample; without shaped links what it counts."""
    return cell.samples.link_bytes or cell.samples.read_bytes


def utilisation(cell: CellResult) -> dict[str, float]:
    if cell.link_bits_per_s is None or not cell.job_s:
        return {}
    possible_bytes = cell.link_bits_per_s / 8 * cell.job_s
    return {name: (counts[-1] - counts[0]) / possible_bytes for name, counts in carried(cell).items()}


class Comparison(NamedTuple):
    """The same work on the same topology, by mode, in the experiment's order."""

    topology: str
    trace: str
    load: str
    modes: dict[str, Group]

    @property
    def any(self) -> CellResult:
        return next(iter(self.modes.values())).first

    @property
    def base(self) -> Group:
        """What the others are compared with."""
        return next(iter(self.modes.values()))

    def gain(self, mode: str) -> float:
        """How many times as fast as the base; below 1 it is slower."""
        return self.base.job_s / self.modes[mode].job_s


def comparisons(cells: Sequence[CellResult]) -> list[Comparison]:
    """`cells` in the experiment's order."""
    found: dict[tuple[str, str, str], dict[str, list[CellResult]]] = {}
    for cell in cells:
        modes = found.setdefault((cell.topology, cell.trace, cell.load), {})
        modes.setdefault(cell.mode, []).append(cell)
    return [
        Comparison(*key, {mode: Group(tuple(of_mode)) for mode, of_mode in modes.items()})
        for key, modes in found.items()
    ]


def by_work(found: Sequence[Comparison]) -> Iterator[tuple[tuple[str, str], list[Comparison]]]:
    """((trace, load), the comparisons of every topology)."""
    works: dict[tuple[str, str], list[Comparison]] = {}
    for comparison in found:
        works.setdefault((comparison.trace, comparison.load), []).append(comparison)
    yield from works.items()


def engine_order(names: Iterable[str]) -> list[str]:
    """Prefill engines first, then by number."""

    def key(name: str) -> tuple[bool, str, int]:
        role, _, number = name.rpartition("-")
        return not name.startswith("prefill"), role, int(number) if number.isdigit() else 0

    return sorted(set(names), key=key)


def modes_of(found: Sequence[Comparison]) -> list[str]:
    return list(dict.fromkeys(mode for comparison in found for mode in comparison.modes))
