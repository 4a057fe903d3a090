"""Lines of columns that are never wider than the console: what does not fit ends with an ellipsis."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.text import Text


class Column(NamedTuple):
    title: str
    right: bool = False
    """Numbers stand on the right."""
    most: int | None = None
    """Widest that it gets; None: as wide as its widest cell."""


def print_columns(
    console: Console, columns: Sequence[Column], rows: Iterable[Sequence[str | Text]], indent: int = 0
) -> None:
    for line in column_lines(console.width, columns, rows, indent):
        print_line(console, line)


def column_lines(
    width: int, columns: Sequence[Column], rows: Iterable[Sequence[str | Text]], indent: int = 0
) -> list[Text]:
    """The titles, and one line per row.  The last column takes the space that is left of `width`."""
    cells = [[plain(cell) for cell in row] for row in rows]
    titles = [Text(column.title, style="dim") for column in columns]
    widths = []
    for index, column in enumerate(columns):
        widest = max(cell.cell_len for cell in (titles[index], *(row[index] for row in cells)))
        widths.append(widest if column.most is None else min(widest, column.most))
    widths[-1] = max(1, width - indent - sum(widths[:-1]) - len(widths) + 1)
    lines = []
    for row in (titles, *cells):
        fitted = [
            fit(cell, most, column.right) for cell, most, column in zip(row, widths, columns, strict=True)
        ]
        lines.append(Text(" " * indent) + Text(" ").join(fitted))
    return lines


def print_line(console: Console, line: Text) -> None:
    """A line as it is, cut at the console's edge, without spaces at its end."""
    line.rstrip()
    console.print(line, no_wrap=True, overflow="ellipsis", crop=True)


def fit(cell: Text, width: int, right: bool = False) -> Text:
    """Exactly `width` columns."""
    cell = cell.copy()
    cell.truncate(width, overflow="ellipsis")
    pad = width - cell.cell_len
    return Text(" " * pad) + cell if right else cell + Text(" " * pad)


def plain(cell: str | Text) -> Text:
    """Nothing that a terminal would obey, and no second line."""
    if isinstance(cell, Text):
        return cell
    return Text("".join(character if character.isprintable() else "\ufffd" for character in cell))
