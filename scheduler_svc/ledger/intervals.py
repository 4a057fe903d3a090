"""Arithmetic on half-open page ranges; a list of ranges is sorted, disjoint and has no empty range."""

from __future__ import annotations

from collections.abc import Iterable

Range = tuple[int, int]
"""`(first_page, end_page)`, half open."""


def union(ranges: Iterable[Range]) -> list[Range]:
    """Every page that lies in at least one range."""
    merged: list[Range] = []
    ranges = sorted(ranges)
    if len(ranges) == 1 and ranges[0][0] < ranges[0][1]:
        return ranges
    for first, end in ranges:
        if first >= end:
            continue
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((first, end))
    return merged


def intersection(left: Iterable[Range], right: Iterable[Range]) -> list[Range]:
    """Every page that lies in a range of both sides."""
    left, right = union(left), union(right)
    if not left or not right:
        return []
    common: list[Range] = []
    i = j = 0
    while i < len(left) and j < len(right):
        first, end = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if first < end:
            common.append((first, end))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return common


def pages(ranges: Iterable[Range]) -> int:
    """Number of distinct pages."""
    return sum(end - first for first, end in union(ranges))
