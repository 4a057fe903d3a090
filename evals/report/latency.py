"""How long single requests take: distributions, not means."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from dualpath_sgl.evals.matrix.experiment import ServiceLevel
from dualpath_sgl.evals.report import style
from dualpath_sgl.evals.report.groups import Comparison, Group
from dualpath_sgl.evals.report.style import Picture, Theme
from dualpath_sgl.terminal.units import duration

FIELDS = {
    "ttft_s": "time to first token",
    "ttst_s": "first to second token",
    "tpot_s": "time per output token",
}
_LEAST_S = 1e-3
"""Shorter times are the clock's and the network's: they are drawn at the left edge."""
_WIDE = 30
"""Where the axis spans more than this ratio only powers of ten are named."""


def distributions(
    name: str, found: Sequence[Comparison], modes: Sequence[str], level: ServiceLevel
) -> Picture:
    """Rows are topologies; columns TTFT, TTST and TPOT; a line for each mode."""
    limits = {"ttft_s": level.ttft_s, "tpot_s": level.tpot_s}

    def draw(figure: Figure, theme: Theme) -> None:
        grid = style.panels(figure, len(found), len(FIELDS), sharey=True, sharex="col")
        for row, comparison in zip(grid, found, strict=True):
            for axes, (field, title) in zip(row, FIELDS.items(), strict=True):
                for mode, group in comparison.modes.items():
                    _line(axes, group.values_s(field), style.of_mode(mode, modes), theme)
                if (limit_s := limits.get(field)) is not None:
                    axes.axvline(limit_s, color=theme.limit, linewidth=1.5)
                axes.set_title(f"{comparison.topology.upper()}  {field[:4].upper()}: {title}", fontsize=9.5)
                _seconds(axes)
            row[0].set_ylabel("requests (%)")
        for axes in grid[-1]:
            axes.set_xlabel("seconds, logarithmic")
        handles = [_handle(mode, modes, theme) for mode in modes]
        handles.append(Line2D([], [], color=theme.limit, linewidth=1.5, label="service level"))
        style.legend_below(figure, handles, min(len(handles), 8))

    told = "; ".join(
        f"{c.topology} {mode} TTFT p50 {_told(group, 0.5)}, p99 {_told(group, 0.99)}"
        for c in found
        for mode, group in c.modes.items()
    )
    return style.picture(
        name, f"Distributions of TTFT, TTST and TPOT by mode. {told}.", 2.1 * len(found) + 0.9, draw
    )


def _told(group: Group, share: float) -> str:
    value = group.quantile_s("ttft_s", share)
    return "-" if value is None else duration(value)


def _line(axes: Axes, values_s: list[float], look: style.Look, theme: Theme) -> None:
    if not values_s:
        return
    shares = [100 * (place + 1) / len(values_s) for place in range(len(values_s))]
    axes.plot(
        [max(_LEAST_S, value) for value in values_s], shares, drawstyle="steps-post",
        color=look.colour(theme), linestyle=look.dashes, linewidth=1.8,
    )  # fmt: skip


def _seconds(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.set_ylim(0, 101)
    left, right = axes.get_xlim()
    named = (1.0,) if right / left > _WIDE else (1.0, 2.0, 5.0)
    axes.xaxis.set_major_locator(LogLocator(subs=named, numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=8)


def _handle(mode: str, modes: Sequence[str], theme: Theme) -> Line2D:
    look = style.of_mode(mode, modes)
    return Line2D([], [], color=look.colour(theme), linestyle=look.dashes, linewidth=2, label=mode)
