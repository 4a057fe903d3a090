"""The read limit of a storage backend: how long a read is held back, and what is refused."""

from __future__ import annotations

import pytest

from dualpath_sgl.limits import read_limit as module
from dualpath_sgl.limits.read_limit import ReadLimit, read_limit


@pytest.fixture
def clock(monkeypatch):
    """Time that only passes by sleeping: how long a read waits must not depend on the machine."""

    class Clock:
        now_s = 100.0

        def monotonic(self) -> float:
            return self.now_s

        def sleep(self, duration_s: float) -> None:
            self.now_s += duration_s

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_read_takes_as_long_as_its_bytes_need(clock):
    ReadLimit(1000.0).pace(500, begun_s=clock.now_s)
    assert clock.now_s == pytest.approx(100.5)


def test_a_read_that_was_slower_than_the_link_is_not_held_back(clock):
    ReadLimit(1000.0).pace(500, begun_s=clock.now_s - 2.0)
    assert clock.now_s == 100.0


def test_reads_that_overlap_share_the_link(clock):
    limit = ReadLimit(1000.0)
    begun_s = clock.now_s
    limit.pace(500, begun_s)
    limit.pace(500, begun_s)
    assert clock.now_s == pytest.approx(101.0)


def test_an_idle_link_saves_nothing_up(clock):
    limit = ReadLimit(1000.0)
    limit.pace(500, clock.now_s)
    clock.now_s += 10.0
    begun_s = clock.now_s
    limit.pace(500, begun_s)
    assert clock.now_s == pytest.approx(begun_s + 0.5)


def test_no_rate_means_no_limit():
    assert read_limit({"prefetch_threshold": 16}) is None


@pytest.mark.parametrize("rate", [0, -1, "80mbit", True, float("nan")])
def test_a_rate_that_is_none_is_refused_with_its_value(rate):
    with pytest.raises(ValueError, match=f"read_rate_bytes_per_s is {rate!r}"):
        read_limit({"read_rate_bytes_per_s": rate})
