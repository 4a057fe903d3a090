"""Numbers with units, and lines of columns that fit."""

import io

import pytest
from rich.console import Console

from dualpath_sgl.terminal.columns import Column, print_columns
from dualpath_sgl.terminal.units import duration, rate, size


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (6_291_456, "6.29 MB"),
        (27_787_264, "27.8 MB"),
        (999_600, "1.00 MB"),
        (468_200_000, "468 MB"),
        (1_380_000_000, "1.38 GB"),
        (5 * 10**18, "5000 PB"),
    ],
)
def test_bytes_have_three_digits_and_a_unit(count, said):
    assert size(count) == said
    assert rate(count) == f"{said}/s"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0.00 ms"),
        (0.00062, "0.62 ms"),
        (0.0019, "1.9 ms"),
        (0.0999, "99.9 ms"),
        (0.612, "612 ms"),
        (0.9996, "1.00 s"),
        (1.8596, "1.86 s"),
        (40.06, "40.1 s"),
        (59.96, "1 min 0 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
    ],
)
def test_times_are_in_the_unit_that_suits_them(seconds, said):
    assert duration(seconds) == said


def test_what_does_not_fit_ends_with_an_ellipsis_and_nothing_reaches_the_terminal_as_a_command():
    console = Console(width=20, file=io.StringIO())
    print_columns(console, [Column("name"), Column("what")], [["a\x1b[31m\nb", "x" * 40]])
    title, line = console.file.getvalue().splitlines()
    assert len(line) == 20 and line.endswith("…")
    assert "\x1b" not in line and line.startswith("a\ufffd[31m\ufffdb x")
    assert title.split() == ["name", "what"]
