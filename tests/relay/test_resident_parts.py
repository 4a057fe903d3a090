"""What a decode engine notes of its pages, and what a prefill engine remembers of it."""

from __future__ import annotations

import pytest
import torch
from sglang_pools import PAGE_TOKENS, POOL_PAGES, mamba, mha

from dualpath_sgl.relay.client.claims import Blocks, Limits, Load
from dualpath_sgl.relay.resident.index import Index
from dualpath_sgl.relay.resident.lives import Lives, lives_of
from dualpath_sgl.relay.resident.whereabouts import Whereabouts
from dualpath_sgl.relay.wire import MOST_ASKED, Held

LIMITS = Limits(2**20, 2**20, 2)


def test_a_life_ends_when_sglang_gives_the_page_back():
    pool = mha("page_first_direct")
    lives = lives_of(pool)
    assert lives is lives_of(pool)
    kept, freed = pool.alloc(2 * PAGE_TOKENS), pool.alloc(PAGE_TOKENS)
    before, gone = lives.now(kept), lives.now(freed)
    pool.free(freed)
    assert not lives.lasts(gone.numbers[0], gone.counts[0])
    assert all(map(lives.lasts, before.numbers, before.counts))
    pool.clear()
    assert not any(map(lives.lasts, before.numbers, before.counts))


def test_every_page_of_many_that_are_freed_ends():
    pool = mha("page_first_direct")
    lives = lives_of(pool)
    every = pool.alloc(POOL_PAGES * PAGE_TOKENS)
    pages = lives.now(every)
    pool.free(every[: 3 * PAGE_TOKENS])
    ended = [not lives.lasts(*page) for page in zip(pages.numbers, pages.counts, strict=True)]
    assert ended == [True] * 3 + [False] * (POOL_PAGES - 3)


def test_slots_that_are_no_whole_pages_end_every_page_that_they_touch():
    lives = Lives(4, PAGE_TOKENS)
    slots = torch.arange(PAGE_TOKENS - 1, 2 * PAGE_TOKENS + 1)
    assert lives.now(slots) is None
    lives.end(slots)
    assert [lives.lasts(page, 0) for page in range(4)] == [False, False, False, True]


def test_a_pool_that_frees_in_a_way_of_its_own_is_not_followed():
    assert lives_of(mamba()) is None


def test_an_index_finds_what_lives_and_forgets_what_lay_there_before():
    lives, index = Lives(4, 1), Index()
    page = torch.tensor([2])
    index.note(["a_k", "a_v"], [100, 200], [8, 8], lives.now(page))
    assert index.find("a_v").address == 200
    lives.end(page)
    assert index.find("a_k") is None
    index.note(["b_k", "b_v"], [100, 200], [8, 8], lives.now(page))
    assert index.find("b_k").address == 100 and len(index) == 2


def test_of_two_copies_the_one_that_is_there_stays():
    """SGLang drops the later one when it takes a prefetch whose pages it has."""
    lives, index = Lives(4, 1), Index()
    first, second = torch.tensor([0]), torch.tensor([1])
    index.note(["a"], [100], [8], lives.now(first))
    index.note(["a"], [200], [8], lives.now(second))
    lives.end(second)
    assert index.find("a").address == 100
    lives.end(first)
    index.note(["a"], [200], [8], lives.now(second))
    assert index.find("a").address == 200


def test_what_was_seen_before_a_page_was_given_back_is_not_found():
    lives, index = Lives(4, 1), Index()
    page = torch.tensor([3])
    seen = lives.now(page)
    lives.end(page)
    index.note(["a"], [100], [8], seen)
    assert index.find("a") is None


def test_the_latest_answer_counts():
    whereabouts = Whereabouts()
    keys = [f"key-{number}" for number in range(MOST_ASKED + 2)]
    first, second = whereabouts.ask(keys, ["d0"])
    whereabouts.heard("d0", Held(first.question, ((0, 2), (5, 1))))
    whereabouts.heard("d0", Held(second.question, ((1, 1),)))
    assert [key for key in keys if whereabouts.holders(key)] == [keys[0], keys[1], keys[5], keys[-1]]
    (again,) = whereabouts.ask(keys[:3], ["d0"])
    whereabouts.heard("d0", Held(again.question, ((2, 1),)))
    assert [key for key in keys[:3] if whereabouts.holders(key)] == [keys[2]]


@pytest.mark.parametrize("who", ["d1", "somebody"])
def test_an_answer_that_nobody_asked_for_is_none(who):
    whereabouts = Whereabouts()
    (question,) = whereabouts.ask(["a"], ["d0", "d1"])
    whereabouts.heard("d1", Held(question.question, ()))
    whereabouts.heard(who, Held(question.question, ((0, 1),)))
    assert whereabouts.holders("a") == []


def load_of(helper_of: list[str]) -> Load:
    size = 2**18
    return Load(
        [str(number) for number in range(len(helper_of))],
        [Blocks((0,), (size,)) for _ in helper_of],
        helper_of,
        ["d0"],
    )


def test_what_a_decode_engine_holds_is_nobody_elses():
    load = load_of(["d0", "d0", "", ""])
    assert load.claim("relay", LIMITS).indices == [2]
    assert load.claim_own(LIMITS, only_leftovers=False) == [3]
    assert load.claim("relay", LIMITS) is None and load.claim_own(LIMITS, only_leftovers=False) == []
    assert load.claim_held("d0", LIMITS).indices == [0]


def test_a_decode_engine_that_comes_in_the_middle_is_asked_for_nothing():
    load = load_of(["d0", "", ""])
    assert load.claim_held("d1", LIMITS) is None
    assert load.give_back(load.claim("relay", LIMITS))
    assert load.claim_held("d1", LIMITS) is None
    assert load.claim("relay", LIMITS).indices == [1]


def test_once_it_is_lost_anybody_may_have_it():
    load = load_of(["d0", "d0"])
    claim = load.claim_held("d0", LIMITS)
    assert load.give_back(claim)
    assert not load.reserve_only(["d0"])
    assert load.reserve_only([])
    assert load.claim_held("d0", LIMITS) is None
    assert load.claim("relay", LIMITS).indices == [0]
    assert load.claim_own(LIMITS, only_leftovers=False) == [1]


def test_what_it_does_not_hold_any_more_is_open_and_not_asked_of_it_again():
    load = load_of(["d0"])
    claim = load.claim_held("d0", LIMITS)
    assert load.begin_landing(claim)
    load.land(claim, [], [0])
    assert load.claim_held("d0", LIMITS) is None
    assert load.claim("relay", LIMITS).indices == [0]
