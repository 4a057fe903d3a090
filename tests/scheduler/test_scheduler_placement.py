"""Placement: the paper's rules, the index over engines, and session affinity."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec.structs import replace
from scheduler_vocabulary import PAGE_TOKENS, cluster, heartbeat, prefill_report

from scheduler_svc.ledger.placed_work import PLACED_TTL_S, PlacedWork
from scheduler_svc.ledger.token_rate import TokenRate
from scheduler_svc.policies.lazy_heap import SLACK_ENTRIES, LazyHeap
from scheduler_svc.policies.placement_policies import (
    MAX_GROUP_ENGINES,
    PLACEMENT_POLICIES,
    RandomPlacement,
    placement_policy,
)
from scheduler_svc.policies.placement_rules import (
    ALPHA_S,
    BETA_S,
    DecodeRule,
    PrefillClass,
    balance_limit,
    choose_decode,
    is_worth_staying,
    pair_rate,
    prefill_class,
    prefill_key,
)
from scheduler_svc.wire.protocol import Error, ErrorCode, Place, Role, Workload


@dataclass
class Seen:
    """An engine as the rules see it."""

    tokens: int = 0
    sequences: int = 0
    tokens_per_s: float = 0.0
    read_queue_bytes: int = 0
    read_rate_bytes_per_s: float = 0.0
    free_device_tokens: int | None = None


seen = st.builds(
    Seen, st.integers(0, 10**6), st.integers(0, 100), st.floats(0, 1e6), st.integers(0, 10**12),
    st.floats(0, 1e11), st.none() | st.integers(0, 10**6),
)  # fmt: skip


def place(state, session=None, tokens=1000, now_s=0.0):
    reply = state.handle(Place(request_id="r", session_id=session, prompt_tokens=tokens), now_s).reply
    return reply.prefill.engine_id, reply.decode.engine_id


def beats(count: int, **loads) -> list:
    return [heartbeat(f"{kind}{index}", **loads) for index in range(count) for kind in "pd"]


# The paper's rules


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        (Seen(tokens=int(BETA_S * 1000), tokens_per_s=1000), PrefillClass.SHORT_QUEUE),
        (Seen(tokens=int(BETA_S * 1000) + 1, tokens_per_s=1000), PrefillClass.OVERLOADED),
        (Seen(read_queue_bytes=int(ALPHA_S * 1000), read_rate_bytes_per_s=1000), PrefillClass.SHORT_QUEUE),
        (Seen(read_queue_bytes=int(ALPHA_S * 1000) + 1, read_rate_bytes_per_s=1000), PrefillClass.LONG_QUEUE),
        (Seen(tokens=10**9, read_queue_bytes=10**12), PrefillClass.SHORT_QUEUE),  # nothing measured
    ],
)
def test_beta_and_alpha_are_times_turned_into_tokens_and_bytes_by_measured_rates(engine, expected):
    assert prefill_class(engine) is expected


def test_a_short_read_queue_is_preferred_and_an_overloaded_engine_comes_last():
    short = Seen(tokens=4000, tokens_per_s=1000)
    long = Seen(tokens=10, read_queue_bytes=4000, read_rate_bytes_per_s=1000)
    overloaded = Seen(tokens=10, tokens_per_s=1)
    assert min([overloaded, long, short], key=prefill_key) is short
    assert min([overloaded, long], key=prefill_key) is long


def test_z_is_five_percent_above_the_mean_with_the_request():
    assert balance_limit(100, [Seen(tokens=300), Seen(tokens=600)]) == pytest.approx(1.05 * 1000 / 2)


def test_within_z_the_fewest_sequences_win_and_beyond_it_the_fewest_tokens():
    few_tokens, few_sequences = Seen(tokens=300, sequences=9), Seen(tokens=320, sequences=1)
    far = Seen(tokens=900, sequences=0)
    chosen = choose_decode(10, [few_tokens, few_sequences, far])
    assert (chosen.position, chosen.rule) == (1, DecodeRule.FEWEST_SEQUENCES)
    chosen = choose_decode(5000, [few_sequences, few_tokens, far])
    assert (chosen.position, chosen.rule) == (1, DecodeRule.LEAST_TOKENS)


def test_only_engines_with_the_memory_are_chosen_while_there_is_one():
    full, roomy, silent = Seen(free_device_tokens=9), Seen(tokens=50, free_device_tokens=10), Seen(tokens=90)
    assert choose_decode(10, [full, roomy]).position == 1
    assert choose_decode(10, [full, silent]).position == 1
    chosen = choose_decode(11, [Seen(tokens=8, free_device_tokens=1), Seen(tokens=7, free_device_tokens=10)])
    assert (chosen.position, chosen.rule) == (1, DecodeRule.NONE_FITS)


@given(st.integers(0, 10**6), st.lists(seen, min_size=1, max_size=8))
def test_the_choice_among_decode_engines_follows_the_paper_step_by_step(tokens, engines):
    chosen = choose_decode(tokens, engines)
    fitting = [e for e in engines if e.free_device_tokens is None or tokens <= e.free_device_tokens]
    within = [e for e in fitting if e.tokens + tokens <= chosen.limit_tokens]
    taken = engines[chosen.position]
    if within:
        assert taken in within and taken.sequences == min(e.sequences for e in within)
    else:
        among = fitting or engines
        assert taken in among and taken.tokens == min(e.tokens for e in among)


def free(tokens: int, *, busy: int = 0) -> Workload:
    return Workload(device_free_tokens=tokens, tokens=busy)


def test_a_decode_engine_without_the_memory_is_passed_over_until_it_has_it():
    beats = heartbeat("p0"), heartbeat("d0", load=free(999)), heartbeat("d1", load=free(9000, busy=4000))
    state = cluster("decode", *beats, placement="paper")
    assert place(state, tokens=1000)[1] == "d1"
    state.handle(heartbeat("d0", load=free(1000)), 0.0)
    assert place(state, tokens=1000)[1] == "d0"
    state.handle(heartbeat("d0", load=free(0)), 0.0)
    assert place(state, tokens=1)[1] == "d1", "nothing free is an answer, from an engine that counts"


def test_a_request_just_placed_takes_its_memory_before_any_heartbeat_shows_it():
    beats = heartbeat("p0"), heartbeat("d0", load=free(2500)), heartbeat("d1", load=free(2500, busy=10_000))
    state = cluster("decode", *beats, placement="paper")
    assert [place(state, tokens=1000)[1] for _ in range(3)] == ["d0", "d0", "d1"]


def test_an_engine_has_as_much_memory_as_its_fullest_rank():
    ranks = [heartbeat("d0", rank=rank, tp_size=2, load=free(size)) for rank, size in enumerate((9000, 9))]
    other = heartbeat("d1", load=free(9000, busy=4000))
    state = cluster("decode", heartbeat("p0"), *ranks, other, placement="paper")
    assert place(state, tokens=10)[1] == "d1"
    assert state.engines.get("d0").free_device_tokens == 9


def test_an_engine_that_never_counts_its_memory_is_not_judged_by_it():
    beats = heartbeat("p0"), heartbeat("d0"), heartbeat("d1", load=free(9000, busy=4000))
    assert place(cluster("decode", *beats, placement="paper"), tokens=1000)[1] == "d0"


def test_staying_is_worth_it_while_the_saved_read_outlasts_the_longer_wait():
    last, best = Seen(tokens=3000, tokens_per_s=1000), Seen(tokens=1000, tokens_per_s=1000)
    assert is_worth_staying(last, best, 2_000_000_000, rate_bytes_per_s=1e9)
    assert not is_worth_staying(last, best, 1_999_999_999, rate_bytes_per_s=1e9)
    assert is_worth_staying(last, best, 1, rate_bytes_per_s=0), "nothing is known against it"


def test_a_pair_reads_with_both_links_and_one_that_has_not_read_is_as_fast_as_the_other():
    slow, fast, unknown = (Seen(read_rate_bytes_per_s=rate) for rate in (1e9, 3e9, 0))
    assert pair_rate(slow, fast) == 4e9
    assert pair_rate(unknown, fast) == pair_rate(fast, unknown) == 6e9
    assert pair_rate(unknown, unknown) == 0


def test_decode_engines_with_equally_many_requests_are_told_apart_by_their_read_queues():
    assert choose_decode(0, [Seen(read_queue_bytes=2), Seen(read_queue_bytes=1)]).position == 1
    assert choose_decode(0, [Seen(read_queue_bytes=1), Seen(sequences=1)]).position == 0


# Work that is placed and not reported


def test_placed_work_counts_until_the_heartbeat_after_its_arrival():
    work = PlacedWork()
    work.placed(1, 100, 0.0)
    work.placed(2, 50, 0.0)
    work.counted(0.1)
    assert (work.tokens, len(work)) == (150, 2)
    work.arrived(1, 120, 0.2)
    assert work.tokens == 170, "the engine knows the exact number"
    work.counted(0.3)
    assert (work.tokens, len(work)) == (50, 1)
    work.counted(PLACED_TTL_S + 0.1)
    assert (work.tokens, len(work)) == (0, 0)


def test_engines_that_all_report_at_once_do_not_draw_all_the_work_to_one_of_them():
    state = cluster("decode", *beats(4), placement="paper")
    for second in range(5):
        for beat in beats(4, load=Workload(tokens=1000 * second)):
            state.handle(beat, float(second))
        chosen = [place(state, now_s=second + 0.1) for _ in range(40)]
        for index in (0, 1):
            assert set(Counter(pair[index] for pair in chosen).values()) == {10}


def test_an_engine_that_a_router_elsewhere_chose_counts_its_requests_too():
    state = cluster("decode", *beats(2), placement="paper")
    state.handle(prefill_report(1, 0, 10, by="p0"), 0.0)
    assert [place(state, tokens=10)[0] for _ in range(3)] == ["p1", "p1", "p1"]


# Rates of processing


def test_a_busy_engine_is_measured_by_what_it_retires():
    rate = TokenRate()
    rate.heartbeat(1000, 0.0)
    assert rate.per_s == 0
    rate.arrived(500)
    rate.heartbeat(900, 1.0)  # 1000 + 500 - 900 in one second
    assert rate.per_s == 600
    rate.heartbeat(100, 2.0)
    assert rate.per_s == pytest.approx(600 + 0.2 * 200)


def test_time_in_which_an_engine_was_idle_is_not_measured():
    rate = TokenRate()
    rate.heartbeat(0, 0.0)
    rate.heartbeat(1000, 1.0)
    rate.heartbeat(0, 5.0)
    rate.heartbeat(1000, 6.0)
    assert rate.per_s == 0


def test_a_long_prefill_is_spread_over_all_the_heartbeats_it_took():
    rate = TokenRate()
    for second, tokens in enumerate((1000, 1000, 1000, 1000, 600)):
        rate.heartbeat(tokens, float(second))
    assert rate.per_s == 100


def test_a_session_stays_with_a_decode_engine_that_is_busy_with_others():
    """A DE decodes all its requests at once: having many of them is no wait for the next."""
    load = Workload(sequences=8, tokens=80_000, read_rate_bytes_per_s=1e9)
    state = cluster("decode", heartbeat("p0", load=load), heartbeat("d0", load=load), placement="affinity")
    assert place(state, session="ada") == ("p0", "d0")
    for second in range(1, 4):
        busy = replace(load, tokens=80_000 - 10_000 * second)
        for beat in (
            heartbeat("p0", load=busy),
            heartbeat("d0", load=busy),
            heartbeat("d1", load=Workload()),
        ):
            state.handle(beat, float(second))
    assert state.engines.get("p0").tokens_per_s > 0
    assert place(state, now_s=3.1) == ("p0", "d1"), "the idle one is next"
    assert place(state, session="ada", now_s=3.1) == ("p0", "d0")


# The index


class Heap(RuleBasedStateMachine):
    """`LazyHeap` agrees with a plain minimum, whatever grows, shrinks, comes and goes."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: dict[int, int] = {}
        self.heap = LazyHeap(self.keys.__getitem__)

    @rule(item=st.integers(0, 9), key=st.integers(0, 20))
    def set_key(self, item, key):
        is_new, lower = item not in self.keys, key < self.keys.get(item, 0)
        self.keys[item] = key
        if is_new:
            self.heap.add(item)
        elif lower:
            self.heap.lowered(item)

    @precondition(lambda self: self.keys)
    @rule(data=st.data())
    def remove(self, data):
        item = data.draw(st.sampled_from(sorted(self.keys)))
        self.heap.remove(item)
        del self.keys[item]

    @rule()
    def least_is_the_minimum(self):
        least = self.heap.least()
        if self.keys:
            assert self.keys[least] == min(self.keys.values())
        else:
            assert least is None

    @invariant()
    def outdated_entries_are_bounded(self):
        assert len(self.heap) == len(self.keys)
        assert len(self.heap._heap) <= 4 * len(self.keys) + SLACK_ENTRIES + 1


TestHeap = Heap.TestCase


def test_equal_items_take_turns_when_being_chosen_raises_their_key():
    keys = dict.fromkeys("abc", 0)
    heap = LazyHeap(keys.__getitem__)
    for item in keys:
        heap.add(item)
    order = []
    for _ in range(9):
        order.append(heap.least())
        keys[order[-1]] += 1
    assert order == list("abcabcabc")


operations = st.lists(
    st.one_of(
        st.tuples(st.just("beat"), st.integers(0, 19), st.integers(0, 5000), st.integers(0, 10**10)),
        st.tuples(st.just("place"), st.integers(1, 3000), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@given(operations)
def test_the_index_chooses_as_a_scan_of_all_engines_would(sequence):
    """Engines `p*` on any host, `d*` in groups of one host: compared at every placement."""
    state = cluster(
        "decode",
        *[heartbeat(f"p{i}") for i in range(10)],
        *[heartbeat(f"d{i}", url=f"http://node{i // 4}:{i + 1}") for i in range(10)],
        placement="paper",
    )
    for kind, value, tokens, queue in sequence:
        if kind == "beat":
            name = f"{'pd'[value % 2]}{value // 2}"
            load = Workload(tokens=tokens, read_queue_bytes=queue, read_rate_bytes_per_s=1e9)
            more = {} if name[0] == "p" else {"url": f"http://node{value // 2 // 4}:{value // 2 + 1}"}
            state.handle(heartbeat(name, load=load, **more), 0.0)
            continue
        engines = list(state.engines._live.values())
        least = min(prefill_key(e) for e in engines if e.role is Role.PREFILL)
        groups: dict[str, list] = {}
        for engine in engines:
            if engine.role is Role.DECODE:
                groups.setdefault(engine.leader.url.rsplit(":", 1)[0], []).append(engine)
        means = {host: sum(e.tokens for e in group) / len(group) for host, group in groups.items()}
        before = {e.engine_id: prefill_key(e) for e in engines}
        prefill, decode = place(state, tokens=value)
        assert before[prefill] == least
        host = state.engines.get(decode).leader.url.rsplit(":", 1)[0]
        assert means[host] == min(means.values())


# Policies by name


def test_an_unknown_placement_is_answered_with_the_known_names():
    with pytest.raises(ValueError, match="'nope' is unknown.*affinity, paper, round_robin, random"):
        placement_policy("nope")


@pytest.mark.parametrize("name", PLACEMENT_POLICIES)
def test_every_placement_uses_every_engine_and_none_that_left(name):
    state = cluster("decode", *beats(3), placement=name)
    pairs = [place(state) for _ in range(60)]
    assert {p for p, _ in pairs} == {"p0", "p1", "p2"} and {d for _, d in pairs} == {"d0", "d1", "d2"}
    for beat in beats(2):
        state.handle(beat, 4.0)
    pairs = [place(state, now_s=6.0) for _ in range(60)]
    assert {p for p, _ in pairs} == {"p0", "p1"} and {d for _, d in pairs} == {"d0", "d1"}
    refusal = state.handle(Place(request_id="r", prompt_tokens=1), 20.0).reply
    assert isinstance(refusal, Error) and refusal.code is ErrorCode.NO_ENGINE


@pytest.mark.parametrize("name", PLACEMENT_POLICIES)
def test_an_engine_without_all_its_ranks_is_not_placed_until_it_has_them(name):
    state = cluster("decode", heartbeat("p0"), heartbeat("d0"), heartbeat("d1", tp_size=2), placement=name)
    assert {place(state)[1] for _ in range(20)} == {"d0"}
    state.handle(heartbeat("d1", rank=1, tp_size=2), 0.0)
    assert {place(state)[1] for _ in range(40)} == {"d0", "d1"}
    for rank, now_s in ((0, 3.0), (0, 6.0)):
        state.handle(heartbeat("d1", rank=rank, tp_size=2), now_s)
        for name_ in ("p0", "d0"):
            state.handle(heartbeat(name_), now_s)
    assert {place(state, now_s=6.0)[1] for _ in range(20)} == {"d0"}


def test_random_placement_repeats_with_its_seed():
    def pairs(seed):
        state, policy = cluster("decode", *beats(5)), RandomPlacement(random.Random(seed))
        for engine in state.engines._live.values():
            policy.joined(engine)
        return [tuple(engine.engine_id for engine in policy.place(None, 1)[:2]) for _ in range(20)]

    assert pairs(1) == pairs(1) != pairs(2)


def test_round_robin_takes_turns_among_the_engines_of_each_role():
    state = cluster("decode", *(heartbeat(name) for name in ("p0", "p1", "d0", "d1", "d2")))
    pairs = [place(state) for _ in range(6)]
    assert [prefill for prefill, _ in pairs] == ["p0", "p1"] * 3
    assert [decode for _, decode in pairs] == ["d0", "d1", "d2"] * 2


def test_a_host_with_many_decode_engines_is_several_groups():
    names = [heartbeat(f"d{i}", url=f"http://node:{i + 1}") for i in range(2 * MAX_GROUP_ENGINES + 1)]
    state = cluster("decode", heartbeat("p0"), *names, placement="paper")
    groups = state._placement_policy._group_of
    assert sorted(Counter(map(id, groups.values())).values()) == [1, MAX_GROUP_ENGINES, MAX_GROUP_ENGINES]
    assert len({place(state)[1] for _ in range(100)}) == len(names)


# Sessions


def test_a_session_stays_with_its_pair_while_others_move_on():
    state = cluster("decode", *beats(2), placement="affinity")
    first = place(state, "a")
    assert place(state, "b") != first
    assert [place(state, "a") for _ in range(3)] == [first] * 3


RATE = 1_000_000.0
KEPT_PAGES = 1000 // PAGE_TOKENS
"""Of a session's 1,000 tokens, with pages of 1,000 bytes: a pair reads them in 31 ms."""


def reading(queue_bytes: int) -> Workload:
    return Workload(read_rate_bytes_per_s=RATE, read_queue_bytes=queue_bytes)


def test_a_session_leaves_an_engine_whose_queue_costs_more_than_its_pages_save():
    state = cluster("decode", *beats(2, load=reading(0)), placement="affinity")
    prefill, decode = place(state, "a", tokens=1000)
    most_bytes = KEPT_PAGES * 1000 // 2
    state.handle(heartbeat(prefill, load=reading(most_bytes)), 0.0)
    assert place(state, "a", tokens=1000)[0] == prefill
    state.handle(heartbeat(prefill, load=reading(most_bytes + 1)), 0.0)
    assert place(state, "a", tokens=1000) == ({"p0": "p1", "p1": "p0"}[prefill], decode)


@pytest.mark.parametrize(("found_pages", "stays"), [(KEPT_PAGES, True), (0, False)])
def test_pages_that_an_engine_has_been_seen_to_evict_are_no_reason_to_stay(found_pages, stays):
    state = cluster("decode", *beats(2, load=reading(0)), placement="affinity")
    prefill, _ = place(state, "a", tokens=1000)
    for _ in range(20):
        found = state.handle(Place(request_id="r", session_id="a", prompt_tokens=1000), 0.0).reply
        assert found.prefill.engine_id == prefill
        state.handle(prefill_report(found.room, found_pages, KEPT_PAGES, by=prefill), 0.0)
        state.handle(heartbeat(prefill, load=reading(0)), 0.0)
    state.handle(heartbeat(prefill, load=reading(KEPT_PAGES * 1000 // 4)), 0.0)
    assert (place(state, "a", tokens=1000)[0] == prefill) is stays


def test_only_the_dead_engine_of_a_session_is_replaced_and_its_return_is_no_reason_to_go_back():
    state = cluster("decode", *beats(2), placement="affinity")
    prefill, decode = place(state, "a")
    other = {"p0": "p1", "p1": "p0"}[prefill]
    for now_s in (4.0, 8.0):
        for name in (other, "d0", "d1"):
            state.handle(heartbeat(name), now_s)
    assert place(state, "a", now_s=8.0) == (other, decode)
    state.handle(heartbeat(prefill), 8.0)
    assert place(state, "a", now_s=8.0) == (other, decode)


def test_sessions_are_bounded_and_the_one_unused_for_longest_goes_first():
    state = cluster("decode", *beats(2), placement="affinity")
    policy = state._placement_policy
    policy._max_sessions = 2
    for session in ("a", "b", "a", "c"):
        place(state, session)
    assert list(policy._sessions) == ["a", "c"]
