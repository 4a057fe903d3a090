"""How plots look: on a light and on a dark page, in print, and to eyes that do not tell all colours apart.

Colours are Okabe and Ito's, which differ for all common kinds of colour blindness; lines differ in dashes and
areas in hatches too, so that a grey print can be read.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH_IN = 9.6
DPI = 150


class Theme(NamedTuple):
    name: str
    paper: str
    ink: str
    quiet: str
    grid: str
    limit: str


LIGHT = Theme("light", "#ffffff", "#1b1f24", "#5b6570", "#dfe3e8", "#c0392b")
DARK = Theme("dark", "#14181d", "#e8ebee", "#9aa5b1", "#2c343d", "#ff7b6b")
THEMES = (LIGHT, DARK)


class Look(NamedTuple):
    """Of one mode, engine or path, the same in every plot."""

    light: str
    dark: str
    dashes: Any = "-"
    """matplotlib's line style."""
    hatch: str = ""
    marker: str = "o"

    def colour(self, theme: Theme) -> str:
        return self.dark if theme is DARK else self.light


_GREY = Look("#7b8794", "#9aa5b1", (0, (4, 2)), "", "s")
_ORACLE = Look("#1b1f24", "#e8ebee", (0, (1, 1)), "..", "*")
_MODES = {
    "basic": _GREY,
    "both": Look("#b65f92", "#d98cb8", (0, (5, 1, 1, 1)), "\\\\", "v"),
    "oracle": _ORACLE,
    "default": Look("#0072b2", "#4aa8e0", "-", "", "o"),
    "decode": Look("#c77f00", "#f0b23f", (0, (3, 1)), "//", "^"),
    "shorter_queue": Look("#009e73", "#2fcf9f", (0, (6, 1)), "xx", "D"),
}
_OTHERS = (
    Look("#d55e00", "#ff8f4d", "-", "++", "P"),
    Look("#56b4e9", "#8ccdf2", (0, (2, 1)), "--", "X"),
    Look("#8a7d00", "#f0e442", (0, (5, 2)), "||", "<"),
    Look("#5d4a9c", "#a796e6", (0, (1, 2)), "oo", ">"),
)
_PREFILL = (Look("#0072b2", "#4aa8e0", "-"), Look("#56b4e9", "#8ccdf2", (0, (5, 1)), "//"))
_DECODE = (
    Look("#d55e00", "#ff8f4d", (0, (4, 1)), "\\\\"),
    Look("#c79a00", "#f0c23f", (0, (1, 1)), "xx"),
    Look("#8a4b08", "#c98a4b", (0, (3, 1, 1, 1)), ".."),
)
PATHS = {
    "none": Look("#a9b2bc", "#5b6570", "-", ""),
    "prefill": Look("#0072b2", "#4aa8e0", "-", "//"),
    "decode": Look("#d55e00", "#ff8f4d", "-", "\\\\"),
    "split": Look("#009e73", "#2fcf9f", "-", "xx"),
}


def of_mode(mode: str, modes: Sequence[str]) -> Look:
    """`modes` are all of the report: those without a look of their own share out the rest."""
    if mode in _MODES:
        return _MODES[mode]
    others = [each for each in modes if each not in _MODES]
    return _OTHERS[others.index(mode) % len(_OTHERS)]


def of_engine(engine: str, engines: Sequence[str]) -> Look:
    looks = _PREFILL if engine.startswith("prefill") else _DECODE
    alike = sorted(each for each in engines if each.startswith("prefill") == engine.startswith("prefill"))
    return looks[alike.index(engine) % len(looks)]


def of_path(path: str) -> Look:
    return PATHS.get(path, _OTHERS[0])


class Picture(NamedTuple):
    """One plot of the page."""

    name: str
    """File name without extension."""
    alt: str
    """What it shows, for those who do not see it."""
    light: bytes
    """PNG."""
    dark: bytes


def picture(name: str, alt: str, height_in: float, draw: Callable[[Figure, Theme], None]) -> Picture:
    """Draw once for each theme."""
    drawn = {theme.name: _png(height_in, draw, theme) for theme in THEMES}
    return Picture(name, alt, drawn["light"], drawn["dark"])


def _png(height_in: float, draw: Callable[[Figure, Theme], None], theme: Theme) -> bytes:
    settings: Any = {
        "font.family": "DejaVu Sans",
        "font.size": 9.5,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.edgecolor": theme.quiet,
        "axes.labelcolor": theme.ink,
        "axes.facecolor": theme.paper,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.facecolor": theme.paper,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "hatch.linewidth": 0.6,
        "legend.frameon": False,
        "text.color": theme.ink,
        "xtick.color": theme.quiet,
        "ytick.color": theme.quiet,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
    }
    with plt.rc_context(settings):
        figure = plt.figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        try:
            draw(figure, theme)
            out = io.BytesIO()
            figure.savefig(out, dpi=DPI, metadata={"Software": None})
            return out.getvalue()
        finally:
            plt.close(figure)


Shared = bool | Literal["none", "all", "row", "col"]


def panels(
    figure: Figure, rows: int, columns: int, sharex: Shared = False, sharey: Shared = False
) -> list[list[Axes]]:
    """`rows` x `columns` axes, as lists."""
    return [list(row) for row in figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey)]


def mark(axes: Axes, value: float, place: float, half: float, theme: Theme) -> None:
    """A limit across the bar at `place`, with an edge that shows on a bar as dark as it is."""
    for colour, width in ((theme.paper, 6.0), (theme.limit, 2.5)):
        axes.vlines(value, place - half, place + half, color=colour, linewidth=width, zorder=5)


def legend_below(figure: Figure, handles: Sequence[Artist], columns: int | None = None) -> None:
    if handles:
        figure.legend(
            handles=list(handles),
            loc="outside lower center",
            ncols=columns or len(handles),
            fontsize=9,
        )
