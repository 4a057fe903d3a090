"""How evenly engines read the store, and how much of the prompts came out of caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from dualpath_sgl.evals.report import style
from dualpath_sgl.evals.report.groups import Comparison, engine_order
from dualpath_sgl.evals.report.style import Picture, Theme

_HALF_BAR = 0.36


def reads_and_hits(name: str, found: Sequence[Comparison], modes: Sequence[str]) -> Picture:
    """Rows are topologies: bytes read by engine with max/avg, and hit rate beside the theoretical one."""
    rows = max(len(comparison.modes) for comparison in found)
    engines = engine_order(engine for c in found for group in c.modes.values() for engine in group.read_bytes)

    def draw(figure: Figure, theme: Theme) -> None:
        grid = style.panels(figure, len(found), 2, sharey="row")
        for (left, right), comparison in zip(grid, found, strict=True):
            _reads(left, comparison, engines, theme)
            _hits(right, comparison, modes, theme)
        handles: list[Artist] = []
        for engine in engines:
            handles.append(Patch(**_fill(engine, engines, theme), label=f"read by {engine}"))
        handles.append(Line2D([], [], color=theme.limit, linewidth=2.5, label="theoretical hit rate"))
        style.legend_below(figure, handles)

    told = "; ".join(
        f"{c.topology} {mode}: max/avg {'-' if group.imbalance is None else f'{group.imbalance:.2f}'}, "
        f"hits {group.hit_rate:.0%} of {group.theoretical_hit_rate:.0%}"
        for c in found
        for mode, group in c.modes.items()
    )
    return style.picture(
        name, f"Bytes read by engine, and hit rates. {told}.", (0.34 * rows + 0.8) * len(found) + 0.5, draw
    )


def _reads(axes: Axes, comparison: Comparison, engines: Sequence[str], theme: Theme) -> None:
    most = max((sum(group.read_bytes.values()) for group in comparison.modes.values()), default=0) / 1e6
    for place, group in enumerate(comparison.modes.values()):
        left = 0.0
        for engine in engines:
            megabytes = group.read_bytes.get(engine, 0) / 1e6
            axes.barh(place, megabytes, 2 * _HALF_BAR, left, **_fill(engine, engines, theme))
            left += megabytes
        told = "nothing read" if group.imbalance is None else f"max/avg {group.imbalance:.2f}"
        axes.text(left + 0.015 * (most or 1), place, told, va="center", fontsize=8.5)
    axes.set_xlim(0, 1.3 * most or 1)
    axes.set_xlabel("read from the store (MB)")
    axes.set_title(f"{comparison.topology.upper()}  who read")
    _names(axes, comparison)


def _fill(engine: str, engines: Sequence[str], theme: Theme) -> dict[str, Any]:
    look = style.of_engine(engine, engines)
    return {"facecolor": look.colour(theme), "edgecolor": theme.paper, "hatch": look.hatch}


def _hits(axes: Axes, comparison: Comparison, modes: Sequence[str], theme: Theme) -> None:
    for place, (mode, group) in enumerate(comparison.modes.items()):
        look = style.of_mode(mode, modes)
        axes.barh(
            place, 100 * group.hit_rate, 2 * _HALF_BAR, color=look.colour(theme), hatch=look.hatch,
            edgecolor=theme.paper, linewidth=0,
        )  # fmt: skip
        style.mark(axes, 100 * group.theoretical_hit_rate, place, 1.25 * _HALF_BAR, theme)
        right = 100 * max(group.hit_rate, group.theoretical_hit_rate)
        axes.text(right + 1.5, place, f"{group.hit_rate:.1%}", va="center", fontsize=8.5)
    axes.set_xlim(0, 118)
    axes.set_xticks((0, 25, 50, 75, 100))
    axes.set_xlabel("prompt tokens out of caches (%)")
    axes.set_title(f"{comparison.topology.upper()}  hit rate")
    _names(axes, comparison)


def _names(axes: Axes, comparison: Comparison) -> None:
    axes.set_yticks(range(len(comparison.modes)), list(comparison.modes))
    axes.set_ylim(len(comparison.modes) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
