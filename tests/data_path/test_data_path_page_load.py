"""PageLoad: any landing order becomes SGLang's contiguous, monotonic acknowledgements."""

from __future__ import annotations

import functools
import threading
from contextlib import suppress
from itertools import pairwise

import pytest
from data_path_world import PAGE_TOKENS, Rank, acknowledgements, host_pool
from hypothesis import given
from hypothesis import strategies as st


@functools.cache
def rank() -> Rank:
    return Rank(pages=64)


@pytest.fixture(autouse=True)
def fresh_pool():
    rank().pool.clear()
    acknowledgements(rank().controller)


def progress(acks) -> list[int]:
    """Acknowledged pages; every acknowledgement but the final one."""
    return [ack.completed_tokens // PAGE_TOKENS for ack in acks if not ack.completed_req]


def finals(acks) -> int:
    return sum(bool(ack.completed_req) for ack in acks)


@st.composite
def landings(draw):
    """(pages, the order in which disjoint ranges of them land); some never do."""
    pages = draw(st.integers(1, 30))
    cuts = sorted({0, pages, *draw(st.lists(st.integers(0, pages), max_size=8))})
    ranges = draw(st.permutations(list(pairwise(cuts))))
    return pages, ranges[: draw(st.integers(0, len(ranges)))]


@given(landings())
def test_acknowledged_pages_are_the_growing_contiguous_prefix(case):
    pages, ranges = case
    rank().pool.clear()
    load = rank().load(pages)
    whole: set[int] = set()
    before = 0
    for first, end in ranges:
        load.land(first, end)
        whole |= set(range(first, end))
        prefix = next(page for page in range(pages + 1) if page not in whole)
        acks = acknowledgements(rank().controller)
        assert load.prefix == prefix
        # Nothing is said when the prefix stands still.
        assert progress(acks) == ([prefix] if prefix > before else []) and finals(acks) == 0
        before = prefix


@given(landings())
def test_prefix_news_cover_every_page_once_and_in_order(case):
    pages, ranges = case
    rank().pool.clear()
    news: list[int] = []
    load = rank().load(pages, on_prefix=lambda load, before: news.extend(range(before, load.prefix)))
    for first, end in ranges:
        load.land(first, end)
    assert news == list(range(load.prefix))
    acknowledgements(rank().controller)


@given(st.integers(0, 5), st.randoms())
def test_the_final_acknowledgement_comes_once_after_the_last_part_let_go(parts, random):
    rank().pool.clear()
    done: list[int] = []
    load = rank().load(4, on_lanes_done=lambda load: done.append(load.prefix))
    for part in range(parts):
        load.open_part(random.choice(["peer", "store"]), part, 4)
    for _ in range(parts):
        load.close_part()
        assert not done and not acknowledgements(rank().controller)
    load.close_part()  # the submitter's own
    assert finals(acknowledgements(rank().controller)) == 1
    assert done == [0]


def test_the_final_acknowledgement_waits_for_the_hold():
    held = []
    order = []
    load = rank().load(2, hold=held.append, on_lanes_done=lambda load: order.append("lanes done"))
    load.open_part("store", 0, load.pages)
    load.close_part()
    load.land(0, 2)
    load.close_part()
    assert order == ["lanes done"] and len(held) == 1
    assert finals(acknowledgements(rank().controller)) == 0
    held[0].acknowledge()
    assert finals(acknowledgements(rank().controller)) == 1


def test_the_final_acknowledgement_is_the_last_one():
    load = rank().load(3)
    load.land(0, 3)
    load.close_part()
    acks = acknowledgements(rank().controller)
    assert [bool(ack.completed_req) for ack in acks] == [False, True]
    assert {ack.operation for ack in acks} == {load.operation}


def test_a_cancelled_load_says_so_and_still_ends_once():
    load = rank().load(3)
    load.open_part("store", 0, load.pages)
    assert not load.cancelled
    load.operation.mark_terminate()
    assert load.cancelled
    load.close_part()
    load.close_part()
    assert finals(acknowledgements(rank().controller)) == 1


def test_pages_that_land_from_many_threads_are_all_counted():
    rank().pool.clear()
    load = rank().load(60)
    begin = threading.Barrier(6)

    def lane(number: int) -> None:
        load.open_part("store", number, 60)
        begin.wait()
        for page in range(number, 60, 6):
            load.land(page, page + 1)
        load.close_part()

    threads = [threading.Thread(target=lane, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    load.close_part()
    acks = acknowledgements(rank().controller)
    assert load.prefix == 60 and finals(acks) == 1
    assert progress(acks) == sorted(set(progress(acks))) and progress(acks)[-1] == 60


def test_a_failing_sidecar_read_does_not_keep_the_final_acknowledgement(monkeypatch):
    def fail(*_):
        raise OSError("sidecar")

    monkeypatch.setattr(rank().controller, "_page_transfer_sidecar", fail, raising=False)
    load = rank().load(1)
    load.close_part()
    assert finals(acknowledgements(rank().controller)) == 1


def test_a_failing_end_of_lanes_callback_does_not_keep_the_final_acknowledgement():
    def fail(_load):
        raise ValueError("a reporter's fault")

    load = rank().load(1, on_lanes_done=fail)
    with suppress(ValueError):  # whether it is logged or raised, SGLang must get its memory back
        load.close_part()
    assert finals(acknowledgements(rank().controller)) == 1


def test_a_lanes_work_counts_from_the_prompt_and_makes_valid_records():
    load = rank().load(5, first_page=7)
    work = load.open_part("store", 2, 5)
    assert (work.first_page, work.end_page) == (9, 9)
    idle = work.record()
    assert (idle.bytes, idle.busy_s) == (0, 0)
    work.begin()
    work.moved(3, 300)
    record = work.record()
    assert (record.first_page, record.end_page, record.bytes) == (9, 12, 300)
    work.void()
    record = work.record()
    assert (record.first_page, record.end_page, record.bytes) == (9, 9, 0)


def test_a_host_pool_gives_two_blocks_per_page_of_page_first_direct():
    pool = host_pool(4)
    from dualpath_sgl.pools.layout import page_blocks, page_bytes

    pages, sizes = page_blocks(pool, pool.alloc(3 * PAGE_TOKENS))
    assert [len(page) for page in pages] == [2, 2, 2]
    assert sum(sizes) == page_bytes(pool)
    assert len({pointer for page in pages for pointer in page}) == 6
