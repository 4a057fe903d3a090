"""Whom a prefill engine asks by key, and who answers: as the scheduler tells, and as keys allow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from resident_world import KV, Holder, Wanted
from test_relay_scheduler import Engine, scheduler_of

from dualpath_sgl.evals.relay.world import Prefill, eventually
from dualpath_sgl.lanes.peer_keys import PeerKeys
from dualpath_sgl.relay.client.relays import Kind
from dualpath_sgl.relay.wire import Hello
from scheduler_svc.wire.keys import generate


@pytest.fixture
def ends() -> Iterator[list]:
    """What is to be called at the test's end."""
    ends: list = []
    yield ends
    for end in reversed(ends):
        end()


@pytest.fixture
def holder_of(ends):
    def make(*arguments, **options) -> Holder:
        holder = Holder(*arguments, **options)
        ends.append(holder.end)
        return holder

    return make


def may_ask(prefill: Prefill, *holders: Holder) -> None:
    def up() -> set:
        return {lane.helper for lane in prefill.loader.lanes_up(Kind.RESIDENT)}

    eventually(lambda: up() == {holder.helper for holder in holders}, f"it may ask {len(holders)}")


def gets(scene, prefill: Prefill, holder: Holder) -> bool:
    """Whether the objects come, which lie with `holder` and nowhere else."""
    wanted = Wanted(holder, scene.store.client)
    missing = [0] * len(wanted.keys)
    prefill.loader.exist(wanted.keys, lambda keys: missing)
    came = prefill.load(wanted) == wanted.sizes
    assert not came or wanted.are_there()
    scene.store.client.unregister_buffer(wanted.address)
    return came


def comes(scene, prefill: Prefill, holder: Holder) -> None:
    """On a busy host an answer may come too late for one load."""
    eventually(lambda: gets(scene, prefill, holder), "what lies there comes")


@pytest.fixture
def keys(tmp_path) -> Path:
    generate(tmp_path / "keys", ["decode-0", "decode-1", "prefill-0", "prefill-1"])
    return tmp_path / "keys"


def own(keys: Path, name: str, known: Path | None = None) -> PeerKeys:
    return PeerKeys(keys / f"peers/{name}.key_secret", (known or keys) / "peers")


def test_with_keys_only_the_decode_engine_itself_is_asked(scene, keys, holder_of):
    prefill = scene.prefill_of(
        [], least_call_bytes=0, hello=Hello(engine="prefill-0"), secure=own(keys, "prefill-0").towards
    )
    honest = holder_of("decode-0", keys=own(keys, "decode-0"))
    impostor = holder_of("decode-1", keys=own(keys, "decode-0"))  # with another one's key
    unkeyed = holder_of("decode-2")
    prefill.relays.replace([honest.helper, impostor.helper, unkeyed.helper])
    may_ask(prefill, honest)
    comes(scene, prefill, honest)
    assert not gets(scene, prefill, impostor)
    assert impostor.server.served.questions == unkeyed.server.served.questions == 0


def test_with_keys_a_stranger_is_not_answered(scene, keys, tmp_path, holder_of):
    """The stranger knows the decode engine's public key, and has one of its own that nobody put there."""
    generate(tmp_path / "strange", ["prefill-0"])
    (tmp_path / "strange/peers/decode-0.key").write_bytes((keys / "peers/decode-0.key").read_bytes())
    holder = holder_of("decode-0", keys=own(keys, "decode-0"))
    known, stranger = (
        scene.prefill_of([holder.helper], least_call_bytes=0, secure=own(directory, "prefill-0").towards)
        for directory in (keys, tmp_path / "strange")
    )
    may_ask(known, holder)
    assert not gets(scene, stranger, holder)
    assert holder.server.served.questions == 0
    comes(scene, known, holder)


def test_a_decode_engine_joins_under_its_own_name_gives_moves_and_leaves(scene, keys, ends, holder_of):
    files = keys / "peers/decode-0.key_secret", keys / "scheduler.key"
    holder, other, impostor = (
        holder_of(name, keys=own(keys, "decode-0")) for name in ("decode-0", "decode-0", "decode-1")
    )
    with scheduler_of(keys) as scheduler:
        engine, stranger = (
            Engine(scene, scheduler, name, keys, objects=objects, least_call_bytes=0)
            for name, objects in (("prefill-0", KV), ("prefill-1", "other"))
        )
        ends += [engine.channel.stop, stranger.channel.stop]
        impostor.registers(scheduler.address, files)
        holder.registers(scheduler.address, files)
        may_ask(engine.prefill, holder)
        assert engine.names() == {"decode-0"}
        comes(scene, engine.prefill, holder)
        holder.moves_to(other)
        may_ask(engine.prefill, other)
        comes(scene, engine.prefill, other)
        holder.leaves()
        engine.hears_of()
        assert not gets(scene, engine.prefill, other)
        assert stranger.names() == set(), "its objects are others"
