"""Memory and cores of the load benchmark, asked before anything starts."""

import os

import pytest

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.load import room
from dualpath_sgl.evals.load.command import CLUSTER
from dualpath_sgl.evals.load.plan import make_plan
from dualpath_sgl.launch.config.cluster import ClusterConfig, Mode, load

CONFIG = load(CLUSTER)
PLAN = make_plan(1, quick=True)


def engines(prefill: int, decode: int, mode: Mode = Mode.BASIC) -> ClusterConfig:
    return CONFIG.model_copy(
        update={
            "mode": mode,
            "prefill": CONFIG.prefill.model_copy(update={"count": prefill}),
            "decode": CONFIG.decode.model_copy(update={"count": decode}),
        }
    )


def test_more_engines_relays_and_clusters_need_more_memory():
    one, two = room.needed_bytes([engines(1, 1)]), room.needed_bytes([engines(2, 2)])
    # 4,096 tokens of 128 KiB on the device and twice as many on the host, beside the engine itself.
    assert two - one == 2 * (room.ENGINE_BYTES + 3 * 4096 * 128 * 1024)
    assert room.needed_bytes([engines(1, 2, Mode.RELAY)]) - room.needed_bytes([engines(1, 2)]) == (
        2 * room.RELAY_BYTES
    )
    both = room.needed_bytes([engines(1, 1), engines(1, 1)])
    assert one < both < 2 * one


def test_the_largest_of_what_runs_at_a_time_must_fit(monkeypatch):
    said: list[str] = []
    together = [[engines(1, 1)], [engines(2, 2)], [engines(1, 1), engines(1, 1)]]
    most = max(room.needed_bytes(configs) for configs in together)
    monkeypatch.setattr(room, "available_bytes", lambda: most)
    room.check(PLAN, together, said.append)
    assert f"{most / room.GIB:.1f} needed" in said[0]
    monkeypatch.setattr(room, "available_bytes", lambda: most - 1)
    with pytest.raises(EvalError, match="GiB of memory are free, and .* are needed"):
        room.check(PLAN, together, said.append)


def test_one_core_is_refused(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    with pytest.raises(EvalError, match="1 core is too few"):
        room.check(PLAN, [[engines(1, 1)]], print)


def test_memory_that_is_given_back_is_waited_for(monkeypatch):
    enough = room.needed_bytes([engines(1, 1)])
    looks = iter([enough - 1, enough - 1, enough])
    monkeypatch.setattr(room, "available_bytes", lambda: next(looks))
    monkeypatch.setattr(room, "LOOK_S", 0.0)
    room.await_room(engines(1, 1))
    assert next(looks, None) is None


def test_memory_that_does_not_come_back_is_an_error_that_says_that_nothing_is_lost(monkeypatch):
    monkeypatch.setattr(room, "available_bytes", lambda: 0)
    monkeypatch.setattr(room, "WAIT_S", 0.0)
    with pytest.raises(EvalError, match="what is measured stays"):
        room.await_room(engines(1, 1))
