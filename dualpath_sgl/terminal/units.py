"""Numbers with units: decimal ones, as storage and networks are sold."""

from __future__ import annotations

_PREFIXES = ("", "k", "M", "G", "T", "P")


def size(count_bytes: float) -> str:
    """`512 B`, `6.29 MB`, `1.38 GB`."""
    return f"{_scaled(count_bytes)}B"


def rate(bytes_per_s: float) -> str:
    """`406 MB/s`, `1.21 GB/s`."""
    return f"{_scaled(bytes_per_s)}B/s"


def duration(seconds: float) -> str:
    """`0.62 ms`, `1.9 ms`, `612 ms`, `1.86 s`, `40.1 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds >= 3600:
        hours, rest = divmod(round(seconds / 60), 60)
        return f"{hours} h {rest} min"
    if round(seconds, 1) >= 60:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s"
    ms = seconds * 1000
    if ms < 999.5:
        return f"{ms:.{2 if ms < 0.995 else 1 if ms < 99.95 else 0}f} ms"
    return f"{_three_digits(seconds)} s"


def _scaled(value: float) -> str:
    prefixes = iter(_PREFIXES)
    prefix = next(prefixes)
    while abs(value) >= 999.5 and prefix != _PREFIXES[-1]:
        value, prefix = value / 1000, next(prefixes)
    return f"{value:.0f} {prefix}" if not prefix else f"{_three_digits(value)} {prefix}"


def _three_digits(value: float) -> str:
    """Three digits that count, but never more than two after the point."""
    return f"{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f}"
