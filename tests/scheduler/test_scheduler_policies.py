from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler_svc.ledger.intervals import intersection, pages, union
from scheduler_svc.policies.path_policies import (
    PATH_POLICIES,
    PathChoice,
    choose_path,
    path_policy,
)
from scheduler_svc.policies.path_request import PathRequest, StoreQueue

counts = st.integers(0, 200)
rates = st.just(0.0) | st.floats(0, allow_nan=False, allow_infinity=False) | st.floats(1e6, 1e11)
queues = st.builds(StoreQueue, read_queue_bytes=st.integers(0, 10**12), read_rate_bytes_per_s=rates)
requests = st.builds(
    PathRequest,
    prefill_local_pages=counts,
    decode_local_pages=counts,
    hit_pages=counts,
    page_bytes=st.integers(1, 10**9),
    prefill=queues,
    decode=queues,
)


def request(prefill_local=0, decode_local=0, hit=10, prefill_queue=0, decode_queue=0) -> PathRequest:
    return PathRequest(
        prefill_local, decode_local, hit, 1000,
        StoreQueue(prefill_queue), StoreQueue(decode_queue),
    )  # fmt: skip


@pytest.mark.parametrize("name", PATH_POLICIES)
@given(sequence=st.lists(requests, max_size=8))
def test_every_policy_stays_between_what_the_decode_side_holds_and_the_hit(name, sequence):
    policy = path_policy(name)
    for one in sequence:
        x = choose_path(policy, one).split_page
        assert min(one.decode_local_pages, one.hit_pages) <= x <= one.hit_pages
        if one.hit_pages <= one.prefill_local_pages:
            assert x == min(one.decode_local_pages, one.hit_pages)


@given(requests)
def test_prefill_never_and_decode_always_reads_on_the_decode_side(one):
    nothing_to_load = one.hit_pages <= one.prefill_local_pages
    assert choose_path(path_policy("prefill"), one).split_page == one.least_split
    expected = one.least_split if nothing_to_load else one.hit_pages
    assert choose_path(path_policy("decode"), one).split_page == expected


def test_round_robin_alternates_over_the_requests_that_leave_a_choice():
    policy = path_policy("round_robin")
    no_choice = [request(prefill_local=10), request(decode_local=12)]
    splits = []
    for _ in range(4):
        splits.append(choose_path(policy, request()).split_page)
        for one in no_choice:
            choose_path(policy, one)
    assert splits == [0, 10, 0, 10]


@given(st.integers(0, 10**12), st.integers(0, 10**12))
def test_shorter_queue_reads_where_fewer_bytes_wait(prefill_queue, decode_queue):
    one = request(decode_local=2, prefill_queue=prefill_queue, decode_queue=decode_queue)
    choice = choose_path(path_policy("shorter_queue"), one)
    if prefill_queue != decode_queue:
        assert choice.split_page == (2 if prefill_queue < decode_queue else 10)
    assert str(prefill_queue) in choice.reason and str(decode_queue) in choice.reason


def test_shorter_queue_uses_both_sides_of_an_idle_cluster():
    policy = path_policy("shorter_queue")
    assert [choose_path(policy, request()).split_page for _ in range(4)] == [0, 10, 0, 10]


def test_a_policy_that_leaves_its_bounds_is_an_error_and_not_a_plan():
    class Wild:
        name = "wild"

        def choose(self, one):
            return PathChoice(one.hit_pages + 1, "")

    with pytest.raises(ValueError, match=r"wild chose page 11 outside \[0, 10\]"):
        choose_path(Wild(), request())


def test_an_unknown_policy_is_answered_with_the_known_names():
    with pytest.raises(ValueError, match="'nope' is unknown.*prefill, decode, round_robin, shorter_queue"):
        path_policy("nope")


def test_policies_of_one_name_share_no_state():
    first, second = path_policy("round_robin"), path_policy("round_robin")
    choose_path(first, request())
    assert choose_path(second, request()).split_page == 0


ranges = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=6)


def as_set(some) -> set[int]:
    return {page for first, end in some for page in range(first, end)}


@given(ranges, ranges)
def test_range_arithmetic_agrees_with_sets(left, right):
    assert as_set(union(left)) == as_set(left)
    assert as_set(intersection(left, right)) == as_set(left) & as_set(right)
    assert pages(left + right) == len(as_set(left) | as_set(right))
