"""Ranks of one engine agree on what landed and on when to stop, over real gloo groups.

Every rank has its own thread, as SGLang's acknowledgement thread, and its own process group.
"""

from __future__ import annotations

import random
import threading
import time
from datetime import timedelta
from queue import Queue
from types import SimpleNamespace

import pytest
import torch
from data_path_world import WAIT_S, eventually
from sglang.srt.managers.cache_controller import PrefetchAck
from torch.distributed import AllreduceOptions, HashStore, ProcessGroupGloo

from dualpath_sgl.lanes.rank_sync import RankSync

MANY_OPERATIONS = 3000


class Rank:
    """One rank's storage threads and queues, as far as its acknowledgements are concerned."""

    prefetch_completion_sync_groups = ("group",)

    def __init__(self, group: ProcessGroupGloo) -> None:
        self._group = group
        self.sync = RankSync()
        self.rounds = 0
        self.prefetch_sync_queue: Queue = Queue()
        self.ack_prefetch_queue: Queue = Queue()
        self.storage_stop_event = threading.Event()
        self.start()

    def start(self) -> None:
        self.storage_stop_event.clear()
        self.sync.open()
        self.thread = threading.Thread(target=self.sync.run, args=(self,), daemon=True)
        self.thread.start()

    def _all_reduce(self, tensor: torch.Tensor, op, _groups) -> None:
        self.rounds += 1
        options = AllreduceOptions()
        options.reduceOp = op
        self._group.allreduce([tensor], options).wait()

    def land(self, operation, tokens: int | None = None, is_over: bool = False) -> None:
        self.prefetch_sync_queue.put(
            PrefetchAck(
                rid=operation.request_id,
                operation=operation,
                completed_tokens=tokens,
                completed_req=is_over or None,
            )
        )

    def stop(self) -> None:
        """The first half of what SGLang's reset does with its storage threads; the second is `stopped`."""
        self.storage_stop_event.set()

    def stopped(self) -> None:
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive(), "the thread is left in a collective"
        self.prefetch_sync_queue.queue.clear()
        self.ack_prefetch_queue.queue.clear()

    @property
    def announced(self) -> dict[str, int]:
        """Tokens by operation, as SGLang's scheduler was told."""
        acks = list(self.ack_prefetch_queue.queue)
        return {ack.rid: ack.completed_tokens for ack in acks if ack.completed_tokens is not None}

    @property
    def over(self) -> list[str]:
        return [ack.rid for ack in list(self.ack_prefetch_queue.queue) if ack.completed_req]


@pytest.fixture
def ranks():
    store = HashStore()
    groups: dict[int, ProcessGroupGloo] = {}

    def join(number: int) -> None:
        groups[number] = ProcessGroupGloo(store, number, 2, timedelta(seconds=WAIT_S))

    threads = [threading.Thread(target=join, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ranks = [Rank(groups[number]) for number in (0, 1)]
    yield ranks
    for rank in ranks:
        rank.stop()
    for rank in ranks:
        rank.stopped()


def operation(name: str) -> SimpleNamespace:
    return SimpleNamespace(request_id=name)


def flush(ranks: list[Rank]) -> None:
    for rank in ranks:
        rank.stop()
    for rank in ranks:
        rank.stopped()
    for rank in ranks:
        rank.start()


def test_ranks_announce_what_landed_on_all_of_them_in_the_same_order(ranks):
    first, second = operation("first"), operation("second")
    for rank in ranks:
        rank.sync.admit(first)
        rank.sync.admit(second)
    ranks[0].land(second, 64)
    ranks[1].land(second, 48)
    ranks[0].land(first, 16, is_over=True)
    for rank in ranks:
        eventually(lambda rank=rank: rank.announced.get("second") == 48, "the lesser progress is announced")
        assert rank.over == []
    ranks[1].land(first, 32, is_over=True)
    for rank in ranks:
        eventually(lambda rank=rank: rank.over == ["first"], "the first operation ends")
        assert rank.announced == {"second": 48, "first": 16}
        rank.land(second, is_over=True)
    for rank in ranks:
        eventually(lambda rank=rank: rank.over == ["first", "second"], "the second operation ends")


@pytest.mark.case("rank_sync_slots_and_flush")
def test_any_number_of_operations_may_be_in_flight(ranks):
    operations = [operation(f"op{number}") for number in range(MANY_OPERATIONS)]
    for rank in ranks:
        for each in operations:
            rank.sync.admit(each)
        rank.land(operations[-1], 512)
    for rank in ranks:
        eventually(lambda rank=rank: rank.announced, "something is announced")
        assert rank.announced == {f"op{MANY_OPERATIONS - 1}": 512}


@pytest.mark.case("rank_sync_slots_and_flush")
def test_a_flush_leaves_no_operation_and_ranks_that_agree_on_the_next_one(ranks):
    lost, next_one = operation("lost"), operation("next")
    ranks[0].sync.admit(lost)  # the other rank's I/O thread stopped before it took it up
    flush(ranks)
    rounds = [rank.rounds for rank in ranks]
    for rank in ranks:
        rank.land(lost, 32, is_over=True)  # by a lane that was not waited for
    time.sleep(0.2)
    assert [rank.rounds for rank in ranks] == rounds, "ranks reduce though nothing is in flight"
    for rank in ranks:
        rank.sync.admit(next_one)
        rank.land(next_one, 16, is_over=True)
    for rank in ranks:
        eventually(lambda rank=rank: rank.over == ["next"], "the operation after the flush ends")
        assert rank.announced == {"next": 16}


def test_an_operation_that_comes_after_the_ranks_agreed_to_stop_is_dropped(ranks):
    for rank in ranks:
        rank.stop()
    for rank in ranks:
        rank.stopped()
    ranks[1].sync.admit(operation("late"))  # that rank's I/O thread ends a moment later
    for rank in ranks:
        rank.start()
    time.sleep(0.1)
    assert ranks[0].rounds == ranks[1].rounds
    flush(ranks)


@pytest.mark.case("flush_at_tp2_hangs")
@pytest.mark.parametrize("in_flight_on", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("later", [0, 1])
def test_a_flush_that_reaches_one_rank_later_stops_both(ranks, in_flight_on, later):
    aborted = operation("aborted")
    for _ in range(3):
        for number in in_flight_on:
            ranks[number].sync.admit(aborted)
        time.sleep(0.02)
        ranks[1 - later].stop()
        time.sleep(random.choice([0.001, 0.005, 0.05]))
        ranks[later].stop()
        for rank in ranks:
            rank.stopped()
        for rank in ranks:
            rank.start()


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_between_flushes_ranks_announce_the_same(ranks, seed):
    rng = random.Random(seed)
    for generation in range(4):
        operations = [operation(f"{generation}/{number}") for number in range(rng.randint(0, 40))]
        landed = [{each.request_id: rng.randint(0, 9) * 16 for each in operations} for _ in ranks]
        over = {each.request_id for each in operations if rng.random() < 0.7}

        def play(number: int, operations=operations, landed=landed, over=over, generation=generation) -> None:
            own = random.Random(f"{seed}/{generation}/{number}")
            rank = ranks[number]
            for each in operations:
                rank.sync.admit(each)
                if own.random() < 0.2:
                    time.sleep(own.random() / 200)
            for each in own.sample(operations, len(operations)):
                rank.land(each, landed[number][each.request_id])
                if each.request_id in over:
                    rank.land(each, is_over=True)

        players = [threading.Thread(target=play, args=(number,)) for number in (0, 1)]
        for player in players:
            player.start()
        for player in players:
            player.join()
        both = {name: min(one[name] for one in landed) for name in landed[0]}
        expected = {name: tokens for name, tokens in both.items() if tokens}
        for rank in ranks:
            eventually(
                lambda rank=rank, over=over: set(rank.over) == over, "every operation that is over ends"
            )
            eventually(lambda rank=rank, e=expected: rank.announced == e, "all common progress is announced")
        assert ranks[0].over == ranks[1].over
        flush(ranks)
