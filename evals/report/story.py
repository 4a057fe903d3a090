"""What the plots say, in sentences: how much faster, why, and what it costs where it does not help."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dualpath_sgl.evals.matrix.modes import DEFAULT, ORACLE
from dualpath_sgl.evals.report.groups import Comparison, Group, engine_order
from dualpath_sgl.terminal.units import duration, size

TIMES = "\N{MULTIPLICATION SIGN}"
HELPS = 1.05
"""Times as fast as the base from which on a mode is said to help; less may be the machine's mood."""
BUSY = 0.7
"""A link in use for this share of the run held the job up."""

MODES = {
    "basic": "SGLang as it is: only prefill engines read the store.",
    "both": "SGLang as it is, with its decode-side prefetch: prefill and decode engines both read every page.",
    DEFAULT: "The mode and the path policy of the cluster file.",
    "auto": "DualPath in the mode that suits the model, with the cluster file's path policy.",
    "relay": "DualPath: relay processes read on behalf of prefill engines.",
    "decode-side": "DualPath: decode engines read too, and forward pages to prefill engines.",
    "prefill": "DualPath, all reads by the prefill engine.",
    "decode": "DualPath, all reads by the decode engine.",
    "shorter_queue": "DualPath, every request read on the side whose read queue is shorter (the paper's rule).",
    "split": "DualPath, every request read by both sides at once, in shares that end together.",
    "round_robin": "DualPath, sides in turns.",
    ORACLE: "SGLang as it is, with a prefill pool that holds every context: nothing is read from the store.",
}


class Card(NamedTuple):
    """One number at the top of the page."""

    value: str
    what: str


class Told(NamedTuple):
    """About the modes of one topology."""

    opening: str
    lines: list[str]


def cards(found: Sequence[Comparison]) -> Iterator[Card]:
    gains = [(c.gain(mode), c, mode) for c in found for mode in _candidates(c) if c.modes[mode].first.policy]
    if gains:
        # Where nothing is read, a difference is the machine's mood.
        reading = [entry for entry in gains if sum(entry[1].base.read_bytes.values())]
        gain, comparison, mode = max(reading or gains, key=lambda entry: entry[0])
        yield Card(
            f"{gain:.2f}{TIMES}",
            f"as fast as {comparison.base.mode} at best: {mode} on {comparison.topology.upper()}",
        )
        best, base = comparison.modes[mode].utilisation, comparison.base.utilisation
        if best and base:
            yield Card(
                f"{_mean(base):.0%} → {_mean(best):.0%}",
                f"of all storage links' rate in use there, {comparison.base.mode} → {mode}",
            )
        worst, comparison, mode = min(gains, key=lambda entry: entry[0])
        where = f"{mode} on {comparison.topology.upper()}, {comparison.load.replace('-', ' ')}"
        if worst < gain:
            yield Card(f"{worst:.2f}{TIMES}", f"as fast at worst: {where}")
    told = [group.tokens_equal for c in found for group in c.modes.values() if group.tokens_equal is not None]
    if told:
        yield Card(f"{sum(told)} of {len(told)}", "cells with every token as a single server's")


def gains(comparison: Comparison) -> Told:
    """How much faster, and why."""
    base = comparison.base
    lines = []
    for mode in filter(lambda mode: _helps(comparison, mode), _candidates(comparison)):
        group = comparison.modes[mode]
        limit_s = group.limit_s
        limit = f"; its storage links alone would allow {base.job_s / limit_s:.2f}" if limit_s else ""
        lines.append(
            f"{mode}: {comparison.gain(mode):.2f} times as fast{limit}. {_links(group)}.{_bytes(base, group)}"
        )
    return Told(
        f"{comparison.topology.upper()}: {base.mode} takes {duration(base.job_s)}. {_links(base)}.", lines
    )


def costs(comparison: Comparison) -> Told:
    """Where a mode does not help: why, and what it costs."""
    base = comparison.base
    lines = []
    for mode in _candidates(comparison):
        if not _helps(comparison, mode):
            group = comparison.modes[mode]
            lines.append(
                f"{mode}: {comparison.gain(mode):.2f} times as fast; {_why(base, group)}."
                f"{_latencies(base, group)}"
            )
    return Told(f"{comparison.topology.upper()}, against {base.mode}:", lines)


def _candidates(comparison: Comparison) -> list[str]:
    return [mode for mode in comparison.modes if mode not in (comparison.base.mode, ORACLE)]


def _helps(comparison: Comparison, mode: str) -> bool:
    return comparison.gain(mode) >= HELPS and sum(comparison.base.read_bytes.values()) > 0


def _mean(shares: dict[str, float]) -> float:
    return sum(shares.values()) / len(shares)


def _links(group: Group) -> str:
    if shares := group.utilisation:
        told = ", ".join(f"{engine} {shares[engine]:.0%}" for engine in engine_order(shares))
        return f"Storage links in use: {told}"
    reads = group.read_bytes
    told = ", ".join(f"{engine} {size(reads[engine])}" for engine in engine_order(reads))
    return f"Read from the store: {told or 'not counted'}"


def _bytes(base: Group, group: Group) -> str:
    read, base_read = sum(group.read_bytes.values()), sum(base.read_bytes.values())
    if base_read and read < 0.95 * base_read:
        return (
            f" It also reads {1 - read / base_read:.0%} less from the store: {size(group.forwarded_bytes)} came "
            "out of decode engines' memory."
        )
    return ""


def _why(base: Group, group: Group) -> str:
    if not sum(base.read_bytes.values()):
        return "nothing is read from the store; what differs is not the load path's doing"
    busiest = max(base.utilisation.values(), default=None)
    if busiest is not None and busiest < BUSY:
        return f"storage is not the bottleneck, its busiest link is in use for {busiest:.0%} of the run"
    if (imbalance := group.imbalance) is not None and imbalance >= 0.9 * len(group.read_bytes):
        reader = max(group.read_bytes, key=lambda engine: group.read_bytes[engine])
        return f"one link carries all reads, that of {reader}"
    if sum(group.read_bytes.values()) > 1.5 * sum(base.read_bytes.values()):
        return "every page is read more than once, so the second link brings nothing new"
    return "what else a request costs outweighs the reads"


def _latencies(base: Group, group: Group) -> str:
    told = []
    for field, name in (("ttft_s", "TTFT"), ("tpot_s", "TPOT")):
        before, after = base.quantile_s(field, 0.5), group.quantile_s(field, 0.5)
        if before and after:
            told.append(f"{name} {after / before - 1:+.0%}")
    return f" Medians: {', '.join(told)}." if told else ""


def row(comparison: Comparison, mode: str) -> list[str]:
    """One line of the table of all cells, under `COLUMNS`."""
    group = comparison.modes[mode]
    first = group.first
    reads = group.read_bytes
    paths = group.paths
    return [
        comparison.topology.upper(),
        comparison.trace,
        comparison.load,
        mode,
        duration(group.job_s),
        "" if group is comparison.base else f"{comparison.gain(mode):.2f}{TIMES}",
        duration(group.limit_s) if group.limit_s else "-",
        *(_quantiles(group, field) for field in ("ttft_s", "ttst_s", "tpot_s")),
        size(sum(reads.values())) if reads else "-",
        "-" if group.imbalance is None else f"{group.imbalance:.2f}",
        size(group.forwarded_bytes) if first.policy else "-",
        f"{group.hit_rate:.1%}",
        f"{group.theoretical_hit_rate:.1%}",
        " / ".join(str(paths.get(path, 0)) for path in ("none", "prefill", "decode", "split"))
        if paths
        else "-",
        str(group.fallbacks) if first.policy else "-",
        {True: "yes", False: "NO", None: "-"}[group.tokens_equal],
        str(len(group.requests)),
    ]


COLUMNS = (
    "topology",
    "trace",
    "load",
    "mode",
    "JCT",
    "gain",
    "limit",
    "TTFT p50 / p99",
    "TTST p50 / p99",
    "TPOT p50 / p99",
    "store read",
    "max/avg",
    "forwarded",
    "hits",
    "theory",
    "paths none / prefill / decode / split",
    "fallbacks",
    "tokens equal",
    "requests",
)


def _quantiles(group: Group, field: str) -> str:
    values = [group.quantile_s(field, share) for share in (0.5, 0.99)]
    return " / ".join("-" if value is None else duration(value) for value in values)
