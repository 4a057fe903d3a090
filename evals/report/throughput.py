"""Against load: what is served, how long the first token takes, and where the service level breaks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from dualpath_sgl.evals.matrix.experiment import ServiceLevel
from dualpath_sgl.evals.report import style
from dualpath_sgl.evals.report.groups import Comparison, Group
from dualpath_sgl.evals.report.style import Picture, Theme

_X = {
    "offline": ("concurrency", "requests in flight"),
    "online": ("agents_per_s", "arriving agents per second"),
}


def against_load(
    name: str, kind: str, found: Sequence[Comparison], modes: Sequence[str], level: ServiceLevel
) -> Picture | None:
    """Rows are topologies: requests per second and mean TTFT over the load; None with fewer than two loads."""
    field, label = _X[kind]
    by_topology: dict[str, dict[str, list[tuple[float, Group]]]] = {}
    for comparison in found:
        if comparison.any.kind != kind:
            continue
        for mode, group in comparison.modes.items():
            place = float(getattr(group.first, field))
            by_topology.setdefault(comparison.topology, {}).setdefault(mode, []).append((place, group))
    places = {place for lines in by_topology.values() for line in lines.values() for place, _ in line}
    if len(places) < 2:
        return None

    def draw(figure: Figure, theme: Theme) -> None:
        grid = style.panels(figure, len(by_topology), 2, sharex=True)
        for (left, right), (topology, lines) in zip(grid, by_topology.items(), strict=True):
            for mode, line in lines.items():
                look = style.of_mode(mode, modes)
                ordered = sorted(line, key=lambda at: at[0])
                xs = [place for place, _ in ordered]
                drawn: dict[str, Any] = {
                    "color": look.colour(theme), "linestyle": look.dashes, "marker": look.marker,
                    "linewidth": 1.8, "markersize": 5,
                }  # fmt: skip
                left.plot(xs, [group.requests_per_s for _, group in ordered], **drawn)
                right.plot(xs, [group.mean_s("ttft_s") or 0.0 for _, group in ordered], **drawn)
            left.set_title(f"{topology.upper()}  served")
            left.set_ylabel("requests per second")
            left.set_ylim(bottom=0)
            right.set_title(f"{topology.upper()}  mean TTFT")
            right.set_ylabel("seconds")
            right.axhline(level.ttft_s, color=theme.limit, linewidth=1.5)
            right.set_ylim(bottom=0)
        for axes in grid[-1]:
            axes.set_xlabel(label)
            axes.set_xticks(sorted(places), [f"{place:g}" for place in sorted(places)])
        _legend(figure, modes, theme)

    return style.picture(name, f"Throughput and mean TTFT over {label}.", 2.3 * len(by_topology) + 0.9, draw)


def capacity(
    name: str, found: Sequence[Comparison], modes: Sequence[str], level: ServiceLevel
) -> Picture | None:
    """One panel a topology: TTFT of every probed rate with the service level; None without a search."""
    searched = [c for c in found if any(group.first.probes for group in c.modes.values())]
    if not searched:
        return None

    def draw(figure: Figure, theme: Theme) -> None:
        (row,) = style.panels(figure, 1, len(searched), sharey=True)
        for axes, comparison in zip(row, searched, strict=True):
            for mode, group in comparison.modes.items():
                _probes(axes, group, style.of_mode(mode, modes), theme)
            axes.axhline(level.ttft_s, color=theme.limit, linewidth=1.5)
            axes.set_title(comparison.topology.upper())
            axes.set_xlabel("arriving agents per second")
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        row[0].set_ylabel("mean TTFT of the last window (s)")
        _legend(figure, modes, theme)

    told = "; ".join(
        f"{c.topology} {mode} {group.first.agents_per_s:.3g} agents/s"
        for c in searched
        for mode, group in c.modes.items()
        if group.first.agents_per_s is not None
    )
    return style.picture(name, f"Capacity under the service level. {told}.", 3.4, draw)


def _probes(axes: Axes, group: Group, look: style.Look, theme: Theme) -> None:
    probes = sorted(group.first.probes, key=lambda probe: probe.agents_per_s)
    colour = look.colour(theme)
    xs, ys = [p.agents_per_s for p in probes], [p.ttft_s for p in probes]
    axes.plot(xs, ys, color=colour, linestyle=look.dashes, linewidth=1.4)
    for probe in probes:
        face = colour if probe.met else theme.paper
        axes.plot(probe.agents_per_s, probe.ttft_s, look.marker, color=colour, markerfacecolor=face)
    if group.first.agents_per_s is not None:
        axes.axvline(group.first.agents_per_s, color=colour, linestyle=":", linewidth=1.2)


def _legend(figure: Figure, modes: Sequence[str], theme: Theme, level: bool = True) -> None:
    handles = []
    for mode in modes:
        look = style.of_mode(mode, modes)
        handles.append(
            Line2D([], [], color=look.colour(theme), linestyle=look.dashes, marker=look.marker, label=mode)
        )
    if level:
        handles.append(Line2D([], [], color=theme.limit, linewidth=1.5, label="service level"))
    style.legend_below(figure, handles, min(len(handles), 8))


def sweep(name: str, field: str, found: Sequence[Comparison], modes: Sequence[str]) -> Picture | None:
    """How the gain over the first mode changes with `append` or `generation` lengths; None without a sweep.

    Columns are topologies, rows loads; agents who come at random are left out, their JCT is mostly waiting.
    """
    other = {"append": "generation", "generation": "append"}[field]
    lines: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    fixed: float | None = None
    for comparison in found:
        cell = comparison.any
        fixed = getattr(cell, other) if fixed is None else fixed
        if cell.kind != "offline" or getattr(cell, other) != fixed:
            continue
        panel = lines.setdefault((comparison.load, comparison.topology), {})
        for mode in list(comparison.modes)[1:]:
            panel.setdefault(mode, []).append((getattr(cell, field), comparison.gain(mode)))
    if len({place for panel in lines.values() for line in panel.values() for place, _ in line}) < 2:
        return None
    loads, topologies = (list(dict.fromkeys(key[part] for key in lines)) for part in (0, 1))

    def draw(figure: Figure, theme: Theme) -> None:
        grid = style.panels(figure, len(loads), len(topologies), sharex=True, sharey=True)
        for row, load in zip(grid, loads, strict=True):
            for axes, topology in zip(row, topologies, strict=True):
                for mode, line in lines.get((load, topology), {}).items():
                    look = style.of_mode(mode, modes)
                    places, gains = zip(*sorted(line), strict=True)
                    axes.plot(
                        places, gains, color=look.colour(theme), linestyle=look.dashes, marker=look.marker,
                        linewidth=1.8,
                    )  # fmt: skip
                axes.axhline(1, color=theme.quiet, linewidth=1)
                axes.set_title(f"{topology.upper()}  {load.replace('-', ' ')}", fontsize=9.5)
            row[0].set_ylabel("times as fast")
        for axes in grid[-1]:
            axes.set_xlabel(f"{field} length (times the trace's)")
        _legend(figure, modes[1:], theme, level=False)

    return style.picture(name, f"Gain over {field} length.", 2.3 * len(loads) + 0.9, draw)
