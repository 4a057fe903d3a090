"""Whose fetch comes next."""

from __future__ import annotations

from dualpath_sgl.relay.fair_queue import Asked, FairQueue
from dualpath_sgl.relay.wire import Fetch

PATIENCE_S = 2.0


class Queue:
    def __init__(self) -> None:
        self.queue = FairQueue(PATIENCE_S)
        self._leases = 0

    def asks(self, engine: str, left: int, at_s: float = 0.0, rank: int = 0, size: int = 1) -> int:
        self._leases += 1
        fetch = Fetch(lease=self._leases, keys=("k",), sizes=(size,), left_bytes=left)
        self.queue.put(Asked(f"{engine}/{rank}".encode(), engine, fetch, at_s))
        return self._leases

    def order(self, now_s: float = 1.0) -> list[int]:
        """The leases as they would be begun."""
        order = []
        while (asked := self.queue.first(now_s)) is not None:
            self.queue.remove(asked.client, asked.fetch.lease)
            order.append(asked.fetch.lease)
        assert self.queue.bytes == 0 and len(self.queue) == 0
        return order


def test_the_engine_with_most_left_comes_first_and_in_its_order():
    queue = Queue()
    few = queue.asks("few", left=400)
    many = [queue.asks("many", left=1000), queue.asks("many", left=900)]
    assert queue.order() == [*many, few]


def test_an_engine_with_little_left_comes_before_all():
    queue = Queue()
    many = queue.asks("many", left=1000)
    little = queue.asks("little", left=100)
    assert queue.order() == [little, many]


def test_a_fetch_that_has_waited_long_comes_before_all():
    queue = Queue()
    waited = queue.asks("medium", left=400, at_s=0.0)
    many = queue.asks("many", left=1000, at_s=1.9)
    little = queue.asks("little", left=10, at_s=1.9)
    assert queue.order(now_s=2.1) == [waited, little, many]


def test_the_ranks_of_an_engine_count_together():
    queue = Queue()
    one = [queue.asks("two ranks", left=300, rank=0), queue.asks("two ranks", left=300, rank=1)]
    other = queue.asks("one rank", left=500)
    assert queue.order() == [one[0], other, one[1]]


def test_only_the_latest_word_of_a_rank_counts():
    queue = Queue()
    hasty = [queue.asks("hasty", left=900), queue.asks("hasty", left=300)]
    other = queue.asks("other", left=600)
    assert queue.order() == [other, *hasty]


def test_a_fetch_can_be_taken_out():
    queue = Queue()
    first, second = queue.asks("a", left=1), queue.asks("a", left=1)
    assert queue.queue.of(b"a/0") == [first, second]
    assert queue.queue.remove(b"a/0", first) is not None
    assert queue.queue.remove(b"a/0", first) is None
    assert queue.queue.remove(b"b/0", second) is None
    assert queue.order() == [second]
