"""Figures as lines for a terminal, as wide and as high as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.console import Console, ConsoleOptions
from rich.text import Text

from dualpath_sgl.launch.top.figures import EngineFigures, Figures, RelayFigures
from dualpath_sgl.terminal.columns import Column, column_lines, plain
from dualpath_sgl.terminal.units import duration, size

ALARM, QUIET, STRONG = "red", "dim", "bold"
BAR_WIDTH = 12
SHADES = "█▓▒░▞▚"
"""Parts of a bar are told apart without colours."""
COLOURS = ("blue", "yellow", "magenta", "cyan", "green", "red")
BEYOND_TABLES = 10
"""Lines above and between the tables."""


class Screen:
    """One frame; a renderable."""

    def __init__(self, figures: Figures, *, fills_terminal: bool) -> None:
        """`fills_terminal`: engines that find no line are counted in the last one."""
        self._figures = figures
        self._fills_terminal = fills_terminal

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        most = max(1, console.height - BEYOND_TABLES) if self._fills_terminal else None
        for line in lines(self._figures, options.max_width, most):
            line.no_wrap, line.overflow = True, "ellipsis"
            yield line


def lines(figures: Figures, width: int, most_rows: int | None = None) -> Iterator[Text]:
    """At most `most_rows` engines and relays."""
    yield _head(figures)
    yield _links(figures.links_bytes_per_s)
    yield _mix("paths", figures.paths_now if any(figures.paths_now.values()) else figures.paths)
    yield _mix("pages", figures.pages)
    yield _troubles(figures)
    yield Text()
    relays = figures.relays if most_rows is None else figures.relays[: max(1, most_rows // 3)]
    left = None if most_rows is None else max(1, most_rows - len(relays))
    engines = figures.engines[:left]
    yield from column_lines(width, _ENGINE_COLUMNS, [_engine(engine) for engine in engines])
    if relays:
        yield Text()
        yield from column_lines(width, _RELAY_COLUMNS, [_relay(relay) for relay in relays])
    hidden = len(figures.engines) - len(engines) + len(figures.relays) - len(relays)
    if hidden:
        yield Text(f"and {hidden} more; --json shows all", style=QUIET)


def _head(figures: Figures) -> Text:
    line = Text("dualpath top", style=STRONG)
    if figures.hit_rate is not None:
        line.append(f"  hit {_percent(figures.hit_rate)}")
    line.append(f"  over {figures.over_s:.1f} s", style=f"not bold {QUIET}")
    if figures.scheduler == "answers":
        line.append(f"  policy {figures.policy}  rooms open {figures.rooms_open}", style="not bold")
    elif figures.scheduler is not None:
        line.append("  scheduler away: ", style=ALARM).append_text(plain(figures.scheduler))
    return line


def _links(links: Mapping[str, float]) -> Text:
    line = Text("links ", style=QUIET)
    for link, byte_rate in links.items():
        line.append(f" {link} ", style="not dim").append(_gb(byte_rate), style=f"not dim {STRONG}")
    return line.append("  GB/s")


def _mix(title: str, parts: Mapping[str, int]) -> Text:
    """`paths  ███▓▓▒▒░░ █prefill 30 ▓decode 70 %`; parts keep their shade whether others are there or not."""
    line, total = Text(f"{title} ", style=QUIET), sum(parts.values())
    if not total:
        return line.append(" none yet")
    line.append(" ")
    for index, (_, count) in enumerate(parts.items()):
        line.append(
            SHADES[index % len(SHADES)] * round(BAR_WIDTH * count / total), style=f"not dim {_colour(index)}"
        )
    for index, (name, count) in enumerate(parts.items()):
        if count:
            line.append(f" {SHADES[index % len(SHADES)]}", style=f"not dim {_colour(index)}")
            line.append_text(plain(f"{name} {100 * count / total:.0f}"))
    return line.append(" %")


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _troubles(figures: Figures) -> Text:
    total = sum(figures.fallbacks.values())
    line = Text("faults", style=QUIET).append(
        f" {figures.faults}", style=f"not dim {ALARM if figures.faults else STRONG}"
    )
    line.append("  fallbacks").append(f" {total}", style=f"not dim {ALARM if total else STRONG}")
    worst = sorted(figures.fallbacks.items(), key=lambda item: -item[1])
    if total:
        line.append_text(plain(" " + ", ".join(f"{reason} {count}" for reason, count in worst if count)))
    return line


_ENGINE_COLUMNS = (
    Column("engine", most=22),
    Column("mode"),
    Column("seen", right=True),
    Column("req", right=True),
    Column("tokens", right=True),
    Column("queued", right=True),
    Column("store", right=True),
    Column("relay", right=True),
    Column("peer GB/s", right=True),
    Column(""),
)


def _engine(engine: EngineFigures) -> list[str | Text]:
    links = engine.links_bytes_per_s
    return [
        engine.engine,
        engine.mode,
        "-" if engine.age_s is None else duration(engine.age_s),
        str(engine.sequences),
        str(engine.tokens),
        size(engine.queued_bytes),
        _gb(links["store"]),
        _gb(links["relay"]),
        _gb(links["peer"]),
        _state(engine),
    ]


def _state(engine: EngineFigures) -> Text:
    if engine.faults:
        return Text(f"{engine.faults} faults", style=ALARM)
    if engine.connected is False:
        return Text("alone", style=ALARM)
    return Text("" if engine.answers else "no metrics", style=QUIET)


_RELAY_COLUMNS = (
    Column("relay", most=22),
    Column("seen", right=True),
    Column("engines", right=True),
    Column("queued", right=True),
    Column("read GB/s", right=True),
    Column("ring free", right=True),
    Column(""),
)


def _relay(relay: RelayFigures) -> list[str | Text]:
    free = relay.ring_free_bytes / relay.ring_bytes if relay.ring_bytes else 0.0
    return [
        relay.relay,
        duration(relay.age_s),
        str(relay.clients),
        size(relay.queued_bytes),
        _gb(relay.read_bytes_per_s),
        _percent(free),
        Text("draining" if relay.draining else f"{relay.faults} faults" if relay.faults else "", style=ALARM),
    ]


def _gb(bytes_per_s: float) -> str:
    """One unit for all: they are compared."""
    return f"{bytes_per_s / 1e9:.3f}"


def _percent(part: float) -> str:
    return f"{100 * part:.0f} %"
