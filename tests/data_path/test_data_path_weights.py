"""After the weights changed, no page of earlier ones is shared under the new ones' name, nor the other way."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import zmq
from data_path_world import WAIT_S
from msgspec.structs import replace
from torch.distributed import HashStore

from dualpath_sgl.control.channel import ControlChannel
from dualpath_sgl.pools import weights
from dualpath_sgl.pools.weights import AS_STARTED, Weights
from scheduler_svc.wire.protocol import RankInfo, Role, Workload, decode_request


@pytest.fixture(scope="module")
def group():
    """The group of an engine with one rank."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


class RlEngine:
    """SGLang's weight updater as far as our hooks look into it, in an engine's process."""

    def __init__(self, group, version: str = AS_STARTED) -> None:
        self.tp_cpu_group = group
        self._session: SimpleNamespace | None = None
        self.weights = Weights(version)

    @property
    def name(self) -> str:
        return self.weights.name

    def update_from_disk(self, version: str | None = None, flush: bool = True) -> None:
        weights.before_update(self)
        self._loaded(version, flush)

    def begin(self) -> None:
        weights.before_begin_session(self)
        self._session = SimpleNamespace(loaded_weights=False)

    def update_from_tensor(self, version: str | None = None, flush: bool = True) -> None:
        weights.before_update_in_session(self)
        if self._session is not None:
            self._session.loaded_weights = True
            self._loaded(version, flush)

    def end(self) -> None:
        weights.before_end_session(self)
        self._session = None
        weights.after_end_session(None, self)

    def flush(self) -> None:
        weights.after_tree_reset(None, None)

    def name_them(self, version: str) -> None:
        weights.after_version_recorded(None, None, new_version=version)

    def _loaded(self, version: str | None, flush: bool) -> None:
        weights.after_version_recorded(None, None, new_version=version)
        if flush:
            self.flush()


@pytest.fixture
def engines(group, monkeypatch):
    """Two engines as started; each acts alone."""

    def acting(engine: RlEngine) -> RlEngine:
        monkeypatch.setattr(weights, "_weights", engine.weights)
        return engine

    made = [RlEngine(group), RlEngine(group)]
    return made, acting


def test_engines_as_started_share_and_need_no_name(engines):
    (one, other), _ = engines
    assert one.name == other.name == ""


def test_engines_started_with_a_version_share_with_those_that_were_updated_to_it(engines, group):
    (one, _), acting = engines
    acting(one).update_from_disk("v2")
    assert one.name == Weights("v2").name != ""


def test_the_same_version_makes_engines_share_again_when_both_have_it(engines):
    (one, other), acting = engines
    acting(one).update_from_disk("v2")
    assert one.name != other.name
    acting(other).update_from_disk("v2")
    assert one.name == other.name


def test_without_a_version_an_engine_shares_with_nobody(engines):
    (one, other), acting = engines
    names = {one.name}
    for engine in (one, other, one):
        acting(engine).update_from_disk()
        names.add(engine.name)
    assert len(names) == 4


def test_a_version_that_comes_later_is_the_name_of_the_last_change(engines):
    (one, other), acting = engines
    acting(one).update_from_disk()
    acting(one).name_them("v2")
    acting(other).update_from_disk("v2")
    assert one.name == other.name


def test_naming_weights_that_did_not_change_changes_no_name(engines):
    (one, other), acting = engines
    acting(one).name_them("v2")
    assert one.name == ""
    acting(other).update_from_disk("v1")
    before = other.name
    acting(other).name_them("v2")
    assert other.name == before


def test_until_the_flush_an_engine_shares_with_nobody_even_with_a_version(engines):
    (one, other), acting = engines
    acting(one).update_from_disk("v2", flush=False)
    acting(other).update_from_disk("v2")
    assert one.name not in ("", other.name)
    mixed = one.name
    acting(one).flush()
    assert one.name == other.name
    acting(one).update_from_disk("v2", flush=False)
    assert one.name not in (mixed, other.name)


def test_the_parts_of_a_session_share_with_nobody_before_its_end(engines):
    (one, other), acting = engines
    acting(other).update_from_disk("v2")
    acting(one).begin()
    for _ in range(3):
        acting(one).update_from_tensor("v2")
        assert one.name not in ("", other.name)
    acting(one).end()
    assert one.name == other.name


def test_a_session_in_which_somebody_else_wrote_the_weights_is_a_change_too(engines):
    (one, other), acting = engines
    acting(one).begin()
    acting(one).flush()
    acting(one).end()
    assert one.name != ""
    unflushed = one.name
    acting(one).flush()
    acting(one).name_them("v2")
    acting(other).update_from_disk("v2")
    assert one.name == other.name != unflushed


def test_an_update_that_sglang_refuses_changes_nothing(engines):
    (one, _), acting = engines
    acting(one).update_from_tensor("v2")
    acting(one).end()
    assert one.name == ""


def test_no_name_is_drawn_twice_whatever_seed_an_operator_gives(group):
    drawn = set()
    for _ in range(5):
        torch.manual_seed(42)
        drawn.add(weights._agreed_name(group))
    assert len(drawn) == 5


def test_the_scheduler_hears_of_another_fingerprint_at_once():
    scheduler = zmq.Context.instance().socket(zmq.ROUTER)
    port = scheduler.bind_to_random_port("tcp://127.0.0.1")
    engine = RankInfo(
        engine_id="d", role=Role.DECODE, url="http://h:1", fingerprint="a", page_size=4, page_bytes=9
    )
    channel = ControlChannel(f"tcp://127.0.0.1:{port}", engine)
    channel.serve(Workload, lambda plan: None, lambda room: None)
    try:
        seen = []
        while "a" not in seen:
            seen.append(_fingerprint(scheduler))
        channel.send(replace(engine, fingerprint="b"))
        while "b" not in seen:
            seen.append(_fingerprint(scheduler))
        assert "a" not in [_fingerprint(scheduler) for _ in range(2)]
    finally:
        channel.stop()
        scheduler.close(0)


def _fingerprint(scheduler: zmq.Socket) -> str:
    """Of the next heartbeat."""
    assert scheduler.poll(WAIT_S * 1000), "no heartbeat"
    return decode_request(scheduler.recv_multipart()[-1]).engine.fingerprint
