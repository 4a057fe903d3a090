"""What happens in time: how busy each storage link is, and which paths requests take."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from dualpath_sgl.evals.matrix.modes import ORACLE
from dualpath_sgl.evals.matrix.results import CellResult
from dualpath_sgl.evals.report import style
from dualpath_sgl.evals.report.groups import Comparison, carried, engine_order, utilisation
from dualpath_sgl.evals.report.style import Picture, Theme

_ROW_IN = 1.25
_BINS = 24


def busy(name: str, found: Sequence[Comparison]) -> Picture | None:
    """Rows are modes, columns topologies, one line for each engine's storage link; None: nothing was read."""
    shown = [mode for mode in _modes(found) if mode != ORACLE]
    cells = {(c.topology, mode): c.modes[mode].first for c in found for mode in shown if mode in c.modes}
    if not any(sum(cell.read_bytes.values()) for cell in cells.values()):
        return None
    engines = engine_order(engine for cell in cells.values() for engine in carried(cell))

    def draw(figure: Figure, theme: Theme) -> None:
        grid = style.panels(figure, len(shown), len(found), sharex="col", sharey=True)
        for row, mode in zip(grid, shown, strict=True):
            for axes, comparison in zip(row, found, strict=True):
                if cell := cells.get((comparison.topology, mode)):
                    _link_panel(axes, cell, engines, theme)
                axes.set_title(f"{comparison.topology.upper()}  {mode}", fontsize=9.5)
        for axes in grid[-1]:
            axes.set_xlabel("time since the first request (s)")
        is_share = all(cell.link_bits_per_s for cell in cells.values())
        figure.supylabel("link use (% of rate)" if is_share else "read (MB/s)", fontsize=9.5)
        handles: list[Artist] = []
        for engine in engines:
            look = style.of_engine(engine, engines)
            handles.append(
                Line2D([], [], color=look.colour(theme), linestyle=look.dashes, linewidth=2, label=engine)
            )
        style.legend_below(figure, handles)

    told = "; ".join(
        f"{topology} {mode}: "
        + ", ".join(f"{engine} {share:.0%}" for engine, share in utilisation(cell).items())
        for (topology, mode), cell in cells.items()
    )
    return style.picture(
        name, f"Use of each storage link in time. Over the whole run, {told}.", _ROW_IN * len(shown) + 1, draw
    )


def _link_panel(axes: Axes, cell: CellResult, engines: Sequence[str], theme: Theme) -> None:
    times_s, bits_per_s = cell.samples.at_s, cell.link_bits_per_s
    brought = carried(cell)
    for engine in engine_order(brought):
        counts = brought[engine]
        look = style.of_engine(engine, engines)
        rates = [
            8 * (after - before) / (end - begin) if end > begin else 0.0
            for (before, after), (begin, end) in zip(pairwise(counts), pairwise(times_s), strict=True)
        ]
        shown = [100 * rate / bits_per_s if bits_per_s else rate / 8e6 for rate in rates]
        colour = look.colour(theme)
        axes.stairs(shown, times_s, color=colour, fill=True, alpha=0.18)
        axes.stairs(shown, times_s, color=colour, linestyle=look.dashes, linewidth=1.6, baseline=None)
    shares = utilisation(cell)
    told = " / ".join(f"{shares[engine]:.0%}" for engine in engine_order(shares))
    axes.text(
        0.995, 1.03, f"mean {told}" if told else "", transform=axes.transAxes, ha="right", va="bottom",
        fontsize=8, color=theme.quiet,
    )  # fmt: skip
    axes.axvline(cell.job_s, color=theme.quiet, linestyle=":", linewidth=1)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 112 if bits_per_s else None)
    if bits_per_s:
        axes.axhline(100, color=theme.limit, linewidth=1)
        axes.set_yticks((0, 50, 100))


def paths(name: str, found: Sequence[Comparison]) -> Picture | None:
    """Rows are modes that have a scheduler, columns topologies; None: there is none."""
    shown = [
        mode
        for mode in _modes(found)
        if any(sum(c.modes[mode].paths.values()) for c in found if mode in c.modes)
    ]
    if not shown:
        return None

    def draw(figure: Figure, theme: Theme) -> None:
        grid = style.panels(figure, len(shown), len(found), sharex="col")
        for row, mode in zip(grid, shown, strict=True):
            for axes, comparison in zip(row, found, strict=True):
                axes.set_title(f"{comparison.topology.upper()}  {mode}", fontsize=9.5)
                if mode in comparison.modes:
                    _path_panel(axes, comparison.modes[mode].first, theme)
        for axes in grid[-1]:
            axes.set_xlabel("time since the first request (s)")
        figure.supylabel("requests planned", fontsize=9.5)
        handles = [
            Patch(
                facecolor=look.colour(theme),
                hatch=look.hatch,
                edgecolor=theme.paper,
                label=_PATH_LABELS[path],
            )
            for path, look in style.PATHS.items()
        ]
        style.legend_below(figure, handles)

    told = "; ".join(
        f"{c.topology} {mode}: " + ", ".join(f"{path} {n}" for path, n in c.modes[mode].paths.items())
        for c in found
        for mode in shown
        if mode in c.modes
    )
    return style.picture(name, f"Load paths in time. Requests: {told}.", _ROW_IN * len(shown) + 1, draw)


_PATH_LABELS = {
    "none": "nothing to load",
    "prefill": "prefill engine reads",
    "decode": "decode engine reads",
    "split": "both read",
}


def _path_panel(axes: Axes, cell: CellResult, theme: Theme) -> None:
    times_s = cell.samples.at_s
    ended_s = max(cell.job_s, times_s[-1])
    # Two looks a bar: with fewer, bars would show when somebody looked.
    bins = max(1, min(_BINS, len(times_s) // 2))
    width_s = ended_s / bins
    bottoms = [0.0] * bins
    middles = [(place + 0.5) * width_s for place in range(bins)]
    for path in [*style.PATHS, *(path for path in cell.samples.paths if path not in style.PATHS)]:
        counts = cell.samples.paths.get(path)
        if not counts:
            continue
        heights = [0.0] * bins
        for (before, after), (begin, end) in zip(pairwise(counts), pairwise(times_s), strict=True):
            heights[min(bins - 1, int((begin + end) / 2 / width_s))] += after - before
        look = style.of_path(path)
        axes.bar(
            middles, heights, width_s, bottoms, color=look.colour(theme), hatch=look.hatch,
            edgecolor=theme.paper, linewidth=0.4,
        )  # fmt: skip
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_xlim(left=0)


def _modes(found: Sequence[Comparison]) -> list[str]:
    return list(dict.fromkeys(mode for comparison in found for mode in comparison.modes))
