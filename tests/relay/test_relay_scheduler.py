"""Relays, a scheduler and prefill engines as processes: who comes, goes, is killed, and what that costs."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from relay_world import SLOW, Loading

from dualpath_sgl.control.channel import ControlChannel
from dualpath_sgl.evals.relay.world import Prefill, eventually
from dualpath_sgl.lanes.peer_keys import PeerKeys
from dualpath_sgl.launch.processes.ports import FreePorts
from dualpath_sgl.relay.wire import Hello
from scheduler_svc.wire.client import SchedulerClient
from scheduler_svc.wire.keys import generate
from scheduler_svc.wire.protocol import Mode, RankInfo, RelayStatus, Role, Workload


class Scheduler:
    """A scheduler process on a port of its own, which can be killed and started again."""

    def __init__(self, keys: Path | None = None) -> None:
        self.address = f"tcp://127.0.0.1:{FreePorts('127.0.0.1').take()}"
        self._keys = keys
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "scheduler_svc", "--bind", self.address]
        if self._keys is not None:
            command += [
                f"--curve-server-key-file={self._keys / 'scheduler.key_secret'}",
                f"--authorized-keys-dir={self._keys / 'peers'}",
            ]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout.readline().startswith("scheduler ready")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    def relays(self) -> dict[str, RelayStatus]:
        with SchedulerClient(self.address) as client:
            return {relay.relay.name: relay for relay in client.status(10).relays}


class Engine:
    """A prefill engine's client of relays, and its channel to the scheduler."""

    def __init__(
        self,
        scene,
        scheduler: Scheduler,
        name: str = "prefill-0",
        keys: Path | None = None,
        objects: str | None = None,
        **options,
    ) -> None:
        """`objects`: that it takes by key, by their name; `options`: of its client."""
        own = PeerKeys(keys / f"peers/{name}.key_secret", keys / "peers") if keys else None
        self.prefill: Prefill = scene.prefill_of(
            [], rate=SLOW, hello=Hello(engine=name), secure=own.towards if own else None, **options
        )
        self.load = Workload()
        info = RankInfo(
            engine_id=name, role=Role.PREFILL, url="http://127.0.0.1:1", fingerprint="relay",
            page_size=16, page_bytes=1000, mode=Mode.RELAY, objects=objects,
        )  # fmt: skip
        key_files = (keys / f"peers/{name}.key_secret", keys / "scheduler.key") if keys else None
        self.channel = ControlChannel(scheduler.address, info, key_files)
        self.channel.serve(lambda: self.load, print, print, self.prefill.relays.take)

    def names(self) -> set[str]:
        return {helper.name for helper in self.prefill.relays.helpers}

    def hears_of(self, *names: str) -> None:
        eventually(lambda: self.names() == set(names), f"it hears of {names}")

    def asks(self, *names: str) -> None:
        def up() -> set[str]:
            return {lane.helper.name for lane in self.prefill.loader.lanes_up()}

        eventually(lambda: up() == set(names), f"{names} may be asked")

    def loads(self, objects) -> dict[str, int]:
        """Bytes by relay."""
        before = {name: lane.bytes for name, lane in self.prefill.counts.relays.items()}
        assert self.prefill.load(objects) == objects.sizes
        assert objects.wrong() == []
        after = self.prefill.counts.relays.items()
        return {name: lane.bytes - before.get(name, 0) for name, lane in after}


@contextmanager
def scheduler_of(keys: Path | None = None) -> Iterator[Scheduler]:
    scheduler = Scheduler(keys)
    try:
        yield scheduler
    finally:
        scheduler.kill()


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    with scheduler_of() as scheduler:
        yield scheduler


@pytest.fixture
def engine_of(scene) -> Iterator:
    engines: list[Engine] = []

    def make(*arguments, **options) -> Engine:
        engines.append(Engine(scene, *arguments, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.channel.stop()


def relay_of(scene, scheduler: Scheduler, name: str, **settings):
    return scene.relay(name, rate=SLOW, scheduler=scheduler.address, **settings)


def test_relays_join_help_and_leave_without_a_restart_of_the_engine(scene, scheduler, engine_of):
    engine = engine_of(scheduler)
    objects = scene.objects()
    assert engine.loads(objects) == {}
    first = relay_of(scene, scheduler, "a")
    engine.asks("a")
    assert engine.loads(objects)["a"] > 0
    relay_of(scene, scheduler, "b")
    engine.asks("a", "b")
    brought = engine.loads(objects)
    assert brought["a"] > 0 and brought["b"] > 0
    eventually(lambda: scheduler.relays()["b"].load.read_bytes > 0, "it says what it has read")
    assert scheduler.relays()["b"].load.read_rate_bytes_per_s > 0
    first.send(signal.SIGTERM)
    engine.hears_of("b")
    assert first.process.wait(20) == 0
    assert engine.loads(objects)["b"] > 0


def test_a_relay_that_drains_brings_what_it_was_asked_for(scene, scheduler, engine_of):
    relay = relay_of(scene, scheduler, "a")
    engine = engine_of(scheduler)
    engine.asks("a")
    objects = scene.objects()
    # Done before the relay, the own client would take back what the relay has not begun.
    engine.prefill.may_read.clear()
    loading = Loading(lambda: engine.prefill.load(objects))
    counts = engine.prefill.counts
    eventually(lambda: counts.relay_bytes, "the relay brings a part")
    relay.send(signal.SIGTERM)
    assert relay.process.wait(20) == 0
    engine.prefill.may_read.set()
    assert loading.ends() == objects.sizes and objects.wrong() == []
    assert counts.relays["a"].lost == 0 and counts.relays["a"].given_back == 0


def test_a_relay_that_is_killed_and_started_again_is_found_at_its_new_place(scene, scheduler, engine_of):
    relay = relay_of(scene, scheduler, "a")
    engine = engine_of(scheduler)
    engine.asks("a")
    objects = scene.objects()
    loading = Loading(lambda: engine.prefill.load(objects))
    eventually(lambda: engine.prefill.counts.relay_bytes, "the relay brings a part")
    relay.process.kill()
    assert loading.ends() == objects.sizes and objects.wrong() == []
    engine.hears_of()  # the scheduler forgets it after its silence
    again = relay_of(scene, scheduler, "a")
    assert again.endpoint != relay.endpoint
    engine.asks("a")
    assert engine.loads(objects)["a"] > 0


def test_while_the_scheduler_is_away_the_last_list_counts_and_then_the_new_one(scene, scheduler, engine_of):
    relay_of(scene, scheduler, "a")
    engine = engine_of(scheduler)
    engine.asks("a")
    scheduler.kill()
    eventually(lambda: not engine.channel.connected, "it is missed")
    objects = scene.objects()
    assert engine.loads(objects)["a"] > 0
    relay_of(scene, scheduler, "b")  # it serves, and nobody knows
    assert engine.loads(objects)["a"] > 0 and engine.names() == {"a"}
    lists: list[set[str]] = []
    engine.prefill.relays.follow(lambda helpers: lists.append({helper.name for helper in helpers}))
    scheduler.start()
    engine.asks("a", "b")
    assert engine.loads(objects)["b"] > 0
    assert all("a" in names for names in lists), "it is not forgotten while it comes back"


def test_two_engines_share_a_relay_by_what_they_have_to_read(scene, scheduler, engine_of):
    relay_of(scene, scheduler, "a")
    engines = [engine_of(scheduler, "prefill-0"), engine_of(scheduler, "prefill-1")]
    for engine, queued in zip(engines, (9_000_000, 3_000_000), strict=True):
        engine.asks("a")
        engine.load = Workload(read_queue_bytes=queued, read_rate_bytes_per_s=SLOW)
    shares = [0.75, 0.25]
    eventually(lambda: [one.prefill.relays.share("a") for one in engines] == shares, "shares are told")
    places = [scene.objects(), scene.objects()]
    loadings = [
        Loading(lambda engine=engine, objects=objects: engine.prefill.load(objects))
        for engine, objects in zip(engines, places, strict=True)
    ]
    for engine, objects, loading in zip(engines, places, loadings, strict=True):
        assert loading.ends() == objects.sizes and objects.wrong() == []
        assert engine.prefill.counts.relay_bytes > 0


def test_an_engine_that_computes_for_longer_than_it_reads_asks_nobody(scene, scheduler, engine_of):
    relay = relay_of(scene, scheduler, "a")
    engine = engine_of(scheduler)
    engine.asks("a")
    busy = Workload(
        read_queue_bytes=1000, read_rate_bytes_per_s=SLOW, ready_tokens=900, compute_rate_tokens_per_s=100.0
    )
    engine.load = busy
    engine.asks()
    assert engine.names() == {"a"}, "it stays connected"
    objects = scene.objects()
    assert sum(engine.loads(objects).values()) == 0 and relay.reads() == []
    engine.load = Workload()
    engine.asks("a")
    assert engine.loads(objects)["a"] > 0


@pytest.fixture
def keys(tmp_path) -> Path:
    generate(tmp_path / "keys", ["relay-a", "relay-b", "prefill-0"])
    return tmp_path / "keys"


def secured(keys: Path, key_of: str) -> dict[str, Path]:
    return {
        "key_file": keys / f"peers/{key_of}.key_secret",
        "peer_keys": keys / "peers",
        "scheduler_key_file": keys / "scheduler.key",
    }


def test_with_keys_a_relay_registers_under_its_own_name_only(scene, keys, engine_of):
    with scheduler_of(keys) as scheduler:
        engine = engine_of(scheduler, keys=keys)
        relay_of(scene, scheduler, "relay-a", **secured(keys, "relay-a"))
        engine.asks("relay-a")
        impostor = relay_of(scene, scheduler, "relay-b", **secured(keys, "prefill-0"))
        eventually(lambda: "name relay-b is not this key's" in impostor.log(), "both sides say why")
        assert engine.names() == {"relay-a"}
        assert engine.loads(scene.objects())["relay-a"] > 0


def test_a_relay_with_a_strange_key_is_told_to_nobody_and_says_what_is_wrong(
    scene, keys, tmp_path, engine_of
):
    generate(tmp_path / "strange", ["relay-a"])
    with scheduler_of(keys) as scheduler:
        engine = engine_of(scheduler, keys=keys)
        settings = {**secured(keys, "relay-a"), "key_file": tmp_path / "strange/peers/relay-a.key_secret"}
        relay = relay_of(scene, scheduler, "relay-a", **settings)
        eventually(lambda: "refuses this relay" in relay.log(), "it says what to do")
        assert "DUALPATH_RELAY_KEY_FILE" in relay.log()
        assert engine.names() == set()
