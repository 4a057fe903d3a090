"""Path policy `split`: both storage lanes are expected to end together, where that is worth it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scheduler_vocabulary import cluster, decode_report, heartbeat, plan_of, prefill_report

from scheduler_svc.policies.lane_model import MAX_RATE_RATIO, LaneModel
from scheduler_svc.policies.path_policies import (
    FORWARD_COST_BYTES,
    FORWARD_COST_S,
    choose_path,
    path_policy,
)
from scheduler_svc.policies.path_request import PathRequest, StoreQueue
from scheduler_svc.wire.protocol import Path

MIB = 1024 * 1024
GB_PER_S = 1e9

pages = st.integers(0, 3000)
queues = st.integers(0, 10**11)
rates = st.sampled_from([0.0, 0.5, 1e8, 1e9, 3e9]) | st.floats(1e6, 1e11)
sizes = st.integers(1, 64 * MIB)


@st.composite
def requests(draw) -> PathRequest:
    return PathRequest(
        draw(pages), draw(pages), draw(pages), draw(sizes),
        StoreQueue(draw(queues), draw(rates)),
        StoreQueue(draw(queues), draw(rates)),
    )  # fmt: skip


def request(
    hit=1000, prefill_local=0, decode_local=0, queues=(0, 0), rates=(GB_PER_S, GB_PER_S), page_bytes=MIB
) -> PathRequest:
    prefill, decode = (StoreQueue(queue, rate) for queue, rate in zip(queues, rates, strict=True))
    return PathRequest(prefill_local, decode_local, hit, page_bytes, prefill, decode)


def split(one: PathRequest) -> int:
    return choose_path(path_policy("split"), one).split_page


def uses_both_lanes(one: PathRequest, x: int) -> bool:
    return x > one.least_split and x < one.hit_pages and one.prefill_local_pages < one.hit_pages


def has_a_choice(one: PathRequest) -> bool:
    return one.hit_pages > max(one.prefill_local_pages, one.decode_local_pages)


@given(requests())
def test_it_stays_between_what_the_decode_side_holds_and_the_hit(one):
    assert one.least_split <= split(one) <= one.hit_pages


@given(requests())
def test_lanes_that_are_both_used_are_expected_to_end_within_one_page_of_each_other(one):
    x = split(one)
    if uses_both_lanes(one, x):
        lanes = LaneModel.of(one)
        page = max(lanes.prefill_page, lanes.decode_page)
        assert abs(lanes.prefill_end(x) - lanes.decode_end(x)) <= page * (1 + 1e-6) + 1e-9 * lanes.end(x)


@given(requests(), queues)
def test_a_longer_prefill_queue_never_lowers_the_split(one, more):
    longer = one.prefill._replace(read_queue_bytes=one.prefill.read_queue_bytes + more)
    assert split(replace(one, prefill=longer)) >= split(one)


@given(requests(), queues)
def test_a_longer_decode_queue_never_raises_the_split(one, more):
    longer = one.decode._replace(read_queue_bytes=one.decode.read_queue_bytes + more)
    assert split(replace(one, decode=longer)) <= split(one)


def cost(lanes: LaneModel) -> float:
    return FORWARD_COST_S if lanes.rates_known else FORWARD_COST_BYTES


@given(requests(), st.data())
def test_no_other_split_would_end_earlier_by_more_than_a_forward_costs(one, data):
    assume(has_a_choice(one))
    lanes, x = LaneModel.of(one), split(one)
    other = data.draw(st.integers(one.least_split, one.hit_pages))
    assert lanes.end(x) <= lanes.end(other) * (1 + 1e-9) + cost(lanes)


@given(requests())
def test_the_decode_side_is_never_asked_for_a_share_that_saves_less_than_it_costs(one):
    lanes, x = LaneModel.of(one), split(one)
    if has_a_choice(one) and x > one.least_split:
        assert lanes.end(one.least_split) - lanes.end(x) >= cost(lanes) * (1 - 1e-9)


@pytest.mark.parametrize("rates", [(0, 0), (GB_PER_S, GB_PER_S), (GB_PER_S, 0), (0, GB_PER_S)])
@given(held=st.integers(0, 500), hit=st.integers(520, 4000))
def test_idle_equal_lanes_share_what_is_missing_in_halves(rates, held, hit):
    x = split(request(hit, held, held, rates=rates))
    assert abs((x - held) - (hit - x)) <= 1


@given(st.floats(1, MAX_RATE_RATIO))
def test_idle_lanes_share_in_proportion_to_their_rates(ratio):
    x = split(request(rates=(GB_PER_S, ratio * GB_PER_S)))
    assert x == pytest.approx(1000 * ratio / (1 + ratio), abs=1)


def test_a_lane_that_was_measured_badly_once_still_gets_work_to_be_measured_by():
    assert split(request(rates=(GB_PER_S, 10.0))) == pytest.approx(1000 / (1 + MAX_RATE_RATIO), abs=1)


@pytest.mark.parametrize(("queues", "expected"), [((0, 10**10), 0), ((10**10, 0), 1000)])
@pytest.mark.parametrize("rates", [(0, 0), (GB_PER_S, GB_PER_S)])
def test_with_very_unequal_queues_the_shorter_side_reads_everything(queues, expected, rates):
    assert split(request(queues=queues, rates=rates)) == expected


def test_a_queue_shifts_the_split_by_half_of_its_length():
    assert split(request(queues=(100 * MIB, 0))) == 550
    assert split(request(queues=(0, 100 * MIB))) == 450


@pytest.mark.parametrize(
    ("pages_of_a_mib", "rate", "both"),
    [
        (8, 0, False),  # half of it saves no more than the 4 MiB it costs
        (10, 0, True),
        (9, GB_PER_S, False),  # 5 ms are 4.8 MiB
        (10, GB_PER_S, True),
        (30, 10 * GB_PER_S, False),
    ],
)
def test_a_request_too_small_for_a_second_path_stays_on_the_prefill_path(pages_of_a_mib, rate, both):
    one = request(pages_of_a_mib, rates=(rate, rate))
    assert split(one) == (pages_of_a_mib // 2 if both else 0)


def test_pages_the_decode_side_lacks_below_the_prefill_sides_weigh_against_it():
    # PE holds 600 of 1000: the DE would have to read 600 useless pages before its first useful one.
    assert split(request(prefill_local=600)) == 0
    # PE holds 300: both end after 500 pages each.
    assert split(request(prefill_local=300)) == 500
    # A queue of 500 pages on the PE makes even the first case worth it: 500 + 1000 - x == x.
    assert split(request(prefill_local=600, queues=(500 * MIB, 0))) == 750


def test_pages_only_the_decode_side_holds_are_forwarded_and_the_rest_is_shared():
    assert split(request(decode_local=400)) == 700


def test_the_reason_names_path_ends_queues_and_rates():
    choice = choose_path(path_policy("split"), request(queues=(100 * MIB, 7)))
    assert str(choice.reason) == (
        "split: expected ends (ms) prefill 1153.4, split 581.7, decode 1053.6; "
        "queues 104857600 and 7 B, rates 1e+09 and 1e+09 B/s"
    )
    unknown = choose_path(path_policy("split"), request(rates=(0, 0)))
    assert str(unknown.reason).startswith(
        "split: expected ends (MB) prefill 1048.6, split 528.5, decode 1052.8;"
    )


def test_two_requests_at_once_are_both_split_and_their_plans_see_each_other():
    beats = [heartbeat(name, page_bytes=MIB) for name in ("p0", "d0")]
    state = cluster("split", *beats)
    plans = []
    for room, held in ((1, 0), (2, 40)):
        state.handle(prefill_report(room, held, 100), 0.0)
        plans.append(plan_of(state.handle(decode_report(room, 0), 0.0)))
    assert [plan.path for plan in plans] == [Path.SPLIT, Path.SPLIT]
    assert plans[0].split_page == 50
    # 60 pages are missing, [0, 40) is held by the PE only: 100 - x == x.
    assert plans[1].split_page == 50
