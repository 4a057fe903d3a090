"""A request's states: where it may go on either side, and the ways it takes there."""

from __future__ import annotations

import threading
from enum import Enum
from types import SimpleNamespace

import pytest
from data_path_world import PAGE_TOKENS, Controller, eventually, rooms
from engine_parts import EngineParts
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import PrefetchOperation
from tree_story import Peer, prompt

from dualpath_sgl import decode
from dualpath_sgl.request_state import DecodeState, IllegalTransition, PrefillState
from scheduler_svc.wire.protocol import Done, Outcome, Path, Plan, Report, Role

P, D = PrefillState, DecodeState

ALLOWED = {
    (P.ARRIVED, P.REPORTED), (P.ARRIVED, P.DONE),
    (P.REPORTED, P.PLANNED), (P.REPORTED, P.WAITING), (P.REPORTED, P.LOADING), (P.REPORTED, P.DONE),
    (P.PLANNED, P.LOADING), (P.PLANNED, P.DONE),
    (P.WAITING, P.LOADING),
    (P.LOADING, P.DONE),
    (D.ARRIVED, D.REPORTED), (D.ARRIVED, D.SETTLED),
    (D.REPORTED, D.PLANNED), (D.REPORTED, D.SETTLED), (D.REPORTED, D.ABORTED),
    (D.PLANNED, D.LOADING), (D.PLANNED, D.SETTLED), (D.PLANNED, D.ABORTED),
    (D.LOADING, D.LATE), (D.LOADING, D.SETTLED), (D.LOADING, D.ABORTED),
    (D.LATE, D.SETTLED),
}  # fmt: skip


@pytest.mark.parametrize(
    ("now", "then"),
    [(now, then) for kind in (P, D) for now in kind for then in kind],
    ids=lambda state: f"{type(state).__name__}.{state.name}",
)
def test_a_request_goes_where_the_table_says_and_nowhere_else(now, then):
    if (now, then) in ALLOWED:
        assert now.to(then) is then
    else:
        with pytest.raises(IllegalTransition, match=f"from {now.value} to {then.value}"):
            now.to(then)


@pytest.mark.parametrize("kind", [P, D])
@given(data=st.data())
def test_every_walk_ends_and_meets_no_state_twice(kind, data):
    state, met = kind.ARRIVED, {kind.ARRIVED}
    while following := sorted((then for now, then in ALLOWED if now is state), key=lambda then: then.value):
        state = state.to(data.draw(st.sampled_from(following)))
        assert state not in met
        met.add(state)
    assert state in (P.DONE, D.SETTLED, D.ABORTED)


def test_only_settled_and_late_requests_may_be_admitted():
    assert {state for state in D if state.admissible} == {D.LATE, D.SETTLED}


@pytest.fixture
def moves(monkeypatch) -> list[Enum]:
    """Every state that a request goes to, in order."""
    seen: list[Enum] = []
    for kind in (P, D):
        move = kind.to

        def noted(self, state, move=move):
            seen.append(move(self, state))
            return seen[-1]

        monkeypatch.setattr(kind, "to", noted)
    return seen


# -- PE: DualPath's parts, and events in the order that a test gives them -----------------------------

PAGES = 3


class Prefill(EngineParts):
    def __init__(self, **options) -> None:
        super().__init__(Role.PREFILL, page_tokens=PAGE_TOKENS, **options)
        self.controller = Controller(self.pool)
        self.room = next(rooms)
        self.rid = f"request-{self.room}"

    def begins(self, rid: str | None = None) -> None:
        self.side.begin(
            SimpleNamespace(
                bootstrap_room=self.room,
                rid=rid or self.rid,
                origin_input_ids=[0] * 30,
                extra_key=None,
                cache_salt=None,
                time_stats=SimpleNamespace(trace_ctx=SimpleNamespace(tracing_enable=False)),
            )
        )

    def reported(self, pages: int = PAGES) -> None:
        """The store holds so many pages."""
        self.begins()
        self.side.matched(self.rid, 0)
        self.side.hits_known(self.operation(), pages * PAGE_TOKENS, PAGE_TOKENS)

    def operation(self) -> PrefetchOperation:
        operation = PrefetchOperation(CacheRequestHandle(self.rid, 0), list(range(PAGES * PAGE_TOKENS)))
        operation.hash_value = [f"{self.rid}/{page}" for page in range(PAGES)]
        operation.storage_start = 0
        return operation

    def gets_memory(self) -> None:
        operation = self.operation()
        operation.host_indices = self.pool.alloc(PAGES * PAGE_TOKENS)
        self.side.take_operation(self.controller, operation)

    def planned(self) -> None:
        """The PE reads everything itself."""
        self.side.on_plan(
            Plan(
                room=self.room,
                path=Path.PREFILL,
                prefill_id="prefill-0",
                decode_id="decode-0",
                prefill_local_pages=0,
                decode_local_pages=0,
                hit_pages=PAGES,
                split_page=0,
                decode_endpoints=("tcp://127.0.0.1:1",),
                policy="prefill",
            )
        )

    def ends(self) -> Done:
        """What it says when its store lane has done its work."""
        self.controller.storage_backend.pages = {
            f"{self.rid}/{page}": self.pool.kv_buffer[:, page].clone() for page in range(PAGES)
        }
        self.store_lane.start()
        eventually(lambda: isinstance(self.sent[-1], Done), "done is said")
        return self.sent[-1]


def test_a_plan_that_comes_before_host_memory(moves):
    prefill = Prefill()
    prefill.reported()
    prefill.planned()
    prefill.gets_memory()
    done = prefill.ends()
    assert moves == [P.REPORTED, P.PLANNED, P.LOADING, P.DONE]
    assert (done.outcome, done.loaded_pages) == (Outcome.OK, PAGES)


def test_a_plan_that_comes_after_host_memory(moves):
    prefill = Prefill()
    prefill.reported()
    prefill.gets_memory()
    prefill.side.start_overdue()
    assert moves == [P.REPORTED, P.WAITING], "its plan may come"
    prefill.planned()
    prefill.planned()  # told twice
    done = prefill.ends()
    assert moves == [P.REPORTED, P.WAITING, P.LOADING, P.DONE]
    assert (done.outcome, done.loaded_pages) == (Outcome.OK, PAGES)


def test_a_plan_that_is_refused_while_host_memory_waits_for_it(moves):
    prefill = Prefill()
    prefill.reported()
    prefill.gets_memory()
    prefill.side.on_no_plan(prefill.room)
    prefill.side.start_overdue()
    done = prefill.ends()
    assert moves == [P.REPORTED, P.WAITING, P.LOADING, P.DONE]
    assert (done.outcome, done.fallback_reason) == (Outcome.FALLBACK, "scheduler refused the report")


def test_without_a_scheduler_nothing_waits(moves):
    prefill = Prefill(connected=False)
    prefill.reported()
    prefill.gets_memory()
    done = prefill.ends()
    assert moves == [P.REPORTED, P.LOADING, P.DONE]
    assert (done.outcome, done.fallback_reason) == (Outcome.FALLBACK, "scheduler away")


@pytest.mark.parametrize("planned", [False, True])
def test_a_prefetch_that_is_revoked_or_aborted_before_it_has_memory(moves, planned):
    for end, outcome, reason in (
        (lambda p: p.side.revoked(p.rid, "no host memory"), Outcome.FALLBACK, "no host memory"),
        (lambda p: p.side.forget(p.rid, aborted=True), Outcome.ABORTED, "aborted"),
    ):
        moves.clear()
        prefill = Prefill()
        prefill.reported()
        if planned:
            prefill.planned()
        end(prefill)
        prefill.side.forget(prefill.rid)
        assert moves == [P.REPORTED, *[P.PLANNED] * planned, P.DONE]
        (done,) = [message for message in prefill.sent if isinstance(message, Done)]
        assert (done.outcome, done.fallback_reason, done.loaded_pages) == (outcome, reason, 0)


def test_a_request_that_is_aborted_while_its_memory_waits_goes_through_the_lanes(moves):
    prefill = Prefill()
    prefill.reported()
    prefill.gets_memory()
    prefill.side.forget(prefill.rid, aborted=True)
    prefill.ends()
    assert moves == [P.REPORTED, P.WAITING, P.LOADING, P.DONE]
    assert prefill.controller.prefetch_sync_queue.queue[-1].completed_req, "SGLang gets its memory back"


def test_a_prompt_of_which_nothing_is_stored_is_done_when_it_is_reported(moves):
    prefill = Prefill()
    prefill.reported(pages=0)
    prefill.side.not_registered(prefill.rid, 0)
    assert moves == [P.REPORTED, P.DONE]
    assert [type(message) for message in prefill.sent] == [Report, Done]


def test_a_request_that_is_forgotten_before_its_hits_are_known_is_not_reported(moves):
    prefill = Prefill()
    prefill.begins()
    request = prefill.side._by_rid[prefill.rid]
    prefill.side.forget(prefill.rid)
    prefill.side.hits_known(prefill.operation(), PAGES * PAGE_TOKENS, PAGE_TOKENS)
    prefill.side._report(request, PAGES)  # as by a thread that had found it before
    assert not moves and not prefill.sent


def test_a_second_request_of_a_room_is_none_of_the_schedulers_business(moves):
    prefill = Prefill()
    prefill.begins("first")
    prefill.begins("second")
    prefill.side.not_registered("second", 0)
    prefill.side.forget("second")
    assert moves == [P.DONE] and not prefill.sent


@pytest.mark.parametrize("attempt", range(20))
def test_of_all_threads_that_would_start_a_load_one_does(moves, attempt):
    prefill = Prefill()
    prefill.reported()
    prefill.gets_memory()
    begin = threading.Barrier(4)
    failed = []

    def at_once(call) -> None:
        begin.wait()
        try:
            call()
        except Exception as error:
            failed.append(error)

    calls = (
        prefill.planned,
        prefill.side.reset,
        prefill.side.start_overdue,
        lambda: prefill.side.forget(prefill.rid),
    )
    threads = [threading.Thread(target=at_once, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and moves == [P.REPORTED, P.WAITING, P.LOADING]
    assert prefill.store_lane.queue_bytes == PAGES * prefill.page_bytes, "its pages were asked for once"


# -- DE: on SGLang's real tree ------------------------------------------------------------------------


def test_a_decode_engine_that_reads_its_share(engine, moves):
    engine = engine("decode")
    peer, tokens = Peer(engine), prompt()
    engine.store_holds(tokens)
    req = engine.arrives(tokens)
    engine.planned(req, peer, pages=8)
    engine.until(lambda: engine.admitted(req), "read")
    assert moves == [D.REPORTED, D.PLANNED, D.LOADING, D.SETTLED]


def test_a_decode_engine_without_a_plan(engine, moves):
    engine = engine("decode")
    req = engine.arrives(prompt())
    engine.channel.bring_none(req.bootstrap_room)
    engine.until(lambda: engine.admitted(req), "given up")
    assert moves == [D.REPORTED, D.SETTLED]
    assert engine.dones(req)[0].fallback_reason == "scheduler refused the report"


def test_a_decode_engine_that_has_nothing_to_read(engine, moves):
    engine = engine("decode")
    req = engine.arrives(prompt())
    engine.planned(req, None, pages=0)
    engine.until(lambda: engine.admitted(req), "nothing to do")
    assert moves == [D.REPORTED, D.PLANNED, D.SETTLED]


def test_a_second_request_of_a_room_is_settled_when_it_arrives(engine, moves):
    engine = engine("decode")
    first = engine.arrives(prompt())
    second = engine.arrives(prompt(), room=first.bootstrap_room)
    assert moves == [D.REPORTED, D.SETTLED]
    engine.until(lambda: engine.admitted(second), "it waits for nothing")


def test_a_read_that_takes_too_long_is_late_until_it_is_over(engine, moves, monkeypatch):
    monkeypatch.setattr(decode, "longest_hold_s", lambda: 0.2)
    engine = engine("decode")
    tokens, gate = prompt(), threading.Event()
    engine.store_holds(tokens)
    engine.store.before_read = lambda keys: gate.wait(30)
    req = engine.arrives(tokens)
    engine.planned(req, None, pages=8, local=8)
    engine.until(lambda: engine.admitted(req), "admitted without its pages")
    engine.goes_on(0.2)
    assert moves == [D.REPORTED, D.PLANNED, D.LOADING, D.LATE]
    gate.set()
    engine.until(lambda: engine.held == 0, "the read is over")
    assert moves[4:] == [D.SETTLED]


@pytest.mark.parametrize("loading", [False, True])
def test_a_request_that_leaves_before_it_is_settled(engine, moves, loading):
    engine = engine("decode")
    tokens, gate = prompt(), threading.Event()
    engine.store_holds(tokens)
    engine.store.before_read = lambda keys: gate.wait(30)
    req = engine.arrives(tokens)
    if loading:
        engine.planned(req, None, pages=8, local=8)
        engine.until(lambda: D.LOADING in moves, "it loads")
    engine.aborts(req)
    engine.step()
    gate.set()
    assert moves == [D.REPORTED, *[D.PLANNED, D.LOADING] * loading, D.ABORTED]
    engine.until(lambda: engine.held == 0, "nothing is held")
    assert [done.outcome for done in engine.dones(req)] == [Outcome.ABORTED]
