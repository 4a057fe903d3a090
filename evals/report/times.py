"""Job completion times, with what the storage links alone need."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dualpath_sgl.evals.matrix.modes import ORACLE
from dualpath_sgl.evals.report import style
from dualpath_sgl.evals.report.groups import Comparison
from dualpath_sgl.evals.report.style import Picture, Theme
from dualpath_sgl.terminal.units import duration

HALF_BAR = 0.36
TIMES = "\N{MULTIPLICATION SIGN}"


def jct(name: str, found: Sequence[Comparison], modes: Sequence[str]) -> Picture:
    """One panel a topology, one bar a mode."""
    rows = max(len(comparison.modes) for comparison in found)

    def draw(figure: Figure, theme: Theme) -> None:
        (axes,) = style.panels(figure, 1, len(found))
        for panel, comparison in zip(axes, found, strict=True):
            _panel(panel, comparison, modes, theme)
        limit = Line2D([], [], color=theme.limit, linewidth=2.5, label="limit: the storage links alone")
        handles = [limit]
        if any(ORACLE in comparison.modes for comparison in found):
            label = "oracle: what is left when nothing is read"
            handles.append(Line2D([], [], color=theme.quiet, linestyle=":", linewidth=1.5, label=label))
        style.legend_below(figure, handles)

    told = "; ".join(f"{c.topology}: {', '.join(_told(c, mode) for mode in c.modes)}" for c in found)
    return style.picture(name, f"Job completion time by mode. {told}.", 0.42 * rows + 1.35, draw)


def _told(comparison: Comparison, mode: str) -> str:
    return f"{mode} {duration(comparison.modes[mode].job_s)} ({comparison.gain(mode):.2f} times as fast)"


def _panel(axes: Axes, comparison: Comparison, modes: Sequence[str], theme: Theme) -> None:
    longest_s = max(group.job_s for group in comparison.modes.values())
    for place, (mode, group) in enumerate(comparison.modes.items()):
        look = style.of_mode(mode, modes)
        axes.barh(
            place,
            group.job_s,
            2 * HALF_BAR,
            color=look.colour(theme),
            edgecolor=theme.paper,
            hatch=look.hatch,
            linewidth=0,
        )
        if len(group.cells) > 1:
            each = [cell.job_s for cell in group.cells]
            axes.scatter(each, [place] * len(each), color=theme.ink, s=10, zorder=4)
        if group.limit_s:
            style.mark(axes, group.limit_s, place, 1.25 * HALF_BAR, theme)
        gain = "" if group is comparison.base else f"  {comparison.gain(mode):.2f}{TIMES}"
        right_s = max(group.job_s, group.limit_s or 0)
        axes.text(
            right_s + 0.015 * longest_s, place, f"{duration(group.job_s)}{gain}", va="center", fontsize=9,
            zorder=6, bbox={"facecolor": theme.paper, "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    if ORACLE in comparison.modes:
        axes.axvline(comparison.modes[ORACLE].job_s, color=theme.quiet, linestyle=":", linewidth=1.5)
    axes.set_yticks(range(len(comparison.modes)), list(comparison.modes))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.33 * longest_s)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("job completion time (s)")
    axes.set_title(comparison.topology.upper())
