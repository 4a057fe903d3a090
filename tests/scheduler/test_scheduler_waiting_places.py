"""Short of time, engines' messages come before placements."""

from __future__ import annotations

import threading

import pytest
import zmq
from scheduler_vocabulary import cluster, heartbeat

from scheduler_svc import waiting_places
from scheduler_svc.metrics import Metrics
from scheduler_svc.server import Server
from scheduler_svc.waiting_places import MOST, PATIENCE_S, WaitingPlaces
from scheduler_svc.wire.client import SchedulerClient
from scheduler_svc.wire.protocol import ErrorCode, Place, Placement

WAIT_S = 30.0


def place(number: int) -> Place:
    return Place(request_id=f"r{number}", prompt_tokens=100)


class Asked:
    def __init__(self) -> None:
        self.answered: list[str] = []
        self.refused: list[str] = []
        self.waiting = WaitingPlaces(self._note(self.answered), self._note(self.refused))

    def _note(self, names: list[str]):
        return lambda peer, place: names.append(f"{peer}/{place.request_id}")


def test_placements_are_taken_in_the_order_of_their_arrival():
    asked = Asked()
    for number, peer in enumerate("abc"):
        asked.waiting.put(peer, place(number), 0.0)
    while asked.waiting:
        asked.waiting.take_one(PATIENCE_S)
    assert asked.answered == ["a/r0", "b/r1", "c/r2"] and asked.refused == []
    with pytest.raises(IndexError):
        asked.waiting.take_one(0.0)


def test_one_that_has_waited_too_long_is_refused_and_the_next_one_answered():
    asked = Asked()
    asked.waiting.put("a", place(1), 0.0)
    asked.waiting.put("b", place(2), PATIENCE_S)
    for _ in range(2):
        asked.waiting.take_one(1.5 * PATIENCE_S)
    assert asked.refused == ["a/r1"] and asked.answered == ["b/r2"]


def test_more_than_fit_are_refused_at_once():
    asked = Asked()
    for number in range(MOST + 2):
        asked.waiting.put("a", place(number), 0.0)
    assert asked.refused == [f"a/r{MOST}", f"a/r{MOST + 1}"] and len(asked.waiting) == MOST


class NotYetRunning:
    """A server in this process, and a peer whose messages all lie in its queue before it runs."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        state = cluster("decode")
        state.expire(1e9)  # the engines that the vocabulary brings
        self.server = Server("inproc://scheduler", state, Metrics(), context=self._context, now_s=lambda: 0.0)
        self.peer = SchedulerClient(self.server.address, self._context)
        self._thread = threading.Thread(target=self.server.run)

    def run(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self.server.stop()
        self._thread.join()
        self._context.destroy(linger=0)


@pytest.fixture
def scheduler():
    made = NotYetRunning()
    yield made
    made.close()


def test_a_placement_waits_for_engines_whose_heartbeats_came_after_it(scheduler):
    scheduler.peer.send(place(1))
    for name in ("p0", "d0"):
        scheduler.peer.send(heartbeat(name))
    scheduler.run()
    answer = scheduler.peer.receive(WAIT_S)
    assert isinstance(answer, Placement) and answer.request_id == "r1"


def test_a_router_that_waited_too_long_is_told_to_place_by_itself(scheduler, monkeypatch):
    monkeypatch.setattr(waiting_places, "PATIENCE_S", -1.0)
    for name in ("p0", "d0"):
        scheduler.peer.send(heartbeat(name))
    scheduler.peer.send(place(1))
    scheduler.run()
    answer = scheduler.peer.receive(WAIT_S)
    assert answer.code is ErrorCode.BUSY and answer.request_id == "r1"
