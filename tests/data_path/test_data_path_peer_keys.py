"""CURVE between engines: a scheduler and a decode engine as processes, a prefill engine's real lane here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

import pytest
import torch
import zmq
from data_path_world import FINGERPRINT, WAIT_S, Rank, eventually, rooms, until_acknowledged

from dualpath_sgl.control.channel import ControlChannel
from dualpath_sgl.lanes.peer_keys import PeerKeys
from dualpath_sgl.lanes.peer_lane import PeerLane
from dualpath_sgl.lanes.peer_protocol import Pull, Release
from dualpath_sgl.start.config import settings
from scheduler_svc.wire.client import SchedulerClient
from scheduler_svc.wire.keys import KeyFileError, generate
from scheduler_svc.wire.protocol import Plan, RankInfo, Report, Role, Workload, encode

PAGES = 4
REFUSED_S = 1.0
"""A stranger gets silence; who is admitted is answered far sooner."""

DECODE_ENGINE = """
import sys, torch
from pathlib import Path
from dualpath_sgl.control.channel import ControlChannel
from dualpath_sgl.lanes.forward import Forwarder
from dualpath_sgl.lanes.page_server import PageServer
from dualpath_sgl.lanes.peer_keys import PeerKeys
from scheduler_svc.wire.protocol import RankInfo, Report, Role, Workload
scheduler, keys, fingerprint = sys.argv[1], Path(sys.argv[2]), sys.argv[5]
count, block = map(int, sys.argv[3:5])
own = keys / "peers/decode-0.key_secret"
memory = torch.full((count * 2 * block,), 7, dtype=torch.uint8)
forwarder = Forwarder("127.0.0.1", "tcp", "", [memory])
server = PageServer("127.0.0.1", forwarder.mooncake_address, fingerprint, 60.0, 60.0, PeerKeys(own, keys / "peers"))
server.start()
engine = RankInfo(engine_id="decode-0", role=Role.DECODE, url="http://127.0.0.1:1",
                  page_endpoint=server.endpoint, fingerprint=fingerprint, page_size=4, page_bytes=2 * block)
channel = ControlChannel(scheduler, engine, (own, keys / "scheduler.key"))
channel.serve(Workload, lambda plan: None, lambda room: None)
print(server.endpoint, flush=True)
first = memory.data_ptr()
for line in sys.stdin:
    room = int(line)
    server.offer(room, 0)
    pages = [(first + 2 * page * block, first + (2 * page + 1) * block) for page in range(count)]
    server.publish(room, pages, (block, block))
    channel.send(Report(room=room, engine_id="decode-0", role=Role.DECODE, prompt_tokens=4 * count,
                        local_pages=count))
    print("open", flush=True)
"""


@contextmanager
def process(*arguments: str) -> Iterator[subprocess.Popen]:
    started = subprocess.Popen(
        [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield started
    finally:
        started.kill()
        started.wait()
        started.stdin.close()
        started.stdout.close()


@dataclass
class World:
    keys: Path
    scheduler: str
    endpoint: str
    """Of the decode engine's page server."""
    decode: subprocess.Popen

    def files(self, name: str) -> tuple[Path, Path]:
        return self.keys / "peers" / f"{name}.key_secret", self.keys / "scheduler.key"

    def open_room(self) -> int:
        """A room whose pages the decode engine offers, and of which it has sent its report."""
        room = next(rooms)
        self.decode.stdin.write(f"{room}\n")
        self.decode.stdin.flush()
        assert self.decode.stdout.readline() == "open\n"
        return room

    def engines(self) -> set[str]:
        with SchedulerClient(self.scheduler, curve_key_files=self.files("operator")) as client:
            return {rank.engine.engine_id for rank in client.status(WAIT_S).engines}


@pytest.fixture(scope="module")
def prefill() -> Rank:
    return Rank(pages=64)


@pytest.fixture
def world(tmp_path, prefill) -> Iterator[World]:
    keys = tmp_path / "keys"
    generate(keys, ["prefill-0", "decode-0", "operator"])
    curve = (
        f"--curve-server-key-file={keys / 'scheduler.key_secret'}",
        f"--authorized-keys-dir={keys / 'peers'}",
    )
    with process("-m", "scheduler_svc", "--policy=decode", "--bind=tcp://127.0.0.1:0", *curve) as scheduler:
        address = scheduler.stdout.readline().split()[-1]
        block = str(prefill.page_bytes // 2)
        with process("-c", DECODE_ENGINE, address, str(keys), str(PAGES), block, FINGERPRINT) as decode:
            yield World(keys, address, decode.stdout.readline().strip(), decode)


@contextmanager
def control(world: World, prefill: Rank) -> Iterator[tuple[ControlChannel, Queue[Plan]]]:
    plans: Queue[Plan] = Queue()
    engine = RankInfo(
        engine_id="prefill-0", role=Role.PREFILL, url="http://127.0.0.1:2", bootstrap_port=3,
        fingerprint=FINGERPRINT, page_size=4, page_bytes=prefill.page_bytes,
    )  # fmt: skip
    channel = ControlChannel(world.scheduler, engine, world.files("prefill-0"))
    channel.serve(Workload, plans.put, lambda room: None)
    try:
        eventually(lambda: world.engines() == {"prefill-0", "decode-0"}, "both engines are known")
        yield channel, plans
    finally:
        channel.stop()


def lane_of(world: World, prefill: Rank, keys: PeerKeys, decode_id: str, missing: list) -> PeerLane:
    lane = PeerLane(
        world.endpoint,
        prefill.forwarder,
        FINGERPRINT,
        REFUSED_S,
        lambda load, first, end, reason: missing.append((first, end, reason)),
        keys.towards(decode_id),
    )
    lane.start()
    return lane


def test_a_load_goes_all_the_way_with_keys_everywhere(world, prefill):
    missing = []
    with control(world, prefill) as (channel, plans):
        room = world.open_room()
        channel.send(
            Report(
                room=room,
                engine_id="prefill-0",
                role=Role.PREFILL,
                prompt_tokens=4 * PAGES,
                local_pages=0,
                hit_pages=PAGES,
            )
        )
        plan = plans.get(timeout=WAIT_S)
        assert (plan.decode_id, plan.decode_endpoints) == ("decode-0", (world.endpoint,))
        lane = lane_of(world, prefill, PeerKeys(*_own(world, "prefill-0")), plan.decode_id, missing)
        load = prefill.load(PAGES)
        lane.submit(load, room, PAGES)
        load.close_part()
        until_acknowledged(load)
    assert (load.prefix, missing) == (PAGES, [])
    assert (prefill.landed(load).view(torch.uint8) == 7).all()


def _own(world: World, name: str) -> tuple[Path, Path]:
    return world.files(name)[0], world.keys / "peers"


class Socket:
    """Whoever they are, they connect to the page server, pull a room, and may get an answer."""

    def __init__(self, world: World, secure=None) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        if secure is not None:
            secure(self._socket)
        self._socket.connect(world.endpoint)

    def pull(self, room: int) -> None:
        self._socket.send(encode(Pull(room=room, first_page=0, end_page=PAGES, fingerprint=FINGERPRINT)))

    def release(self, room: int) -> None:
        self._socket.send(encode(Release(room=room)))

    def answered(self, timeout_s: float) -> bool:
        """Whether something came; all that came is taken."""
        came = bool(self._socket.poll(timeout_s * 1000))
        while self._socket.poll(0):
            self._socket.recv()
        return came

    def __enter__(self) -> Socket:
        return self

    def __exit__(self, *_) -> None:
        self._context.destroy(linger=0)


def test_strangers_get_nothing_from_a_page_server_and_end_nothing(world, tmp_path):
    generate(tmp_path / "others", ["prefill-0", "decode-0"])
    others, room = tmp_path / "others/peers", world.open_room()
    wrong_key = PeerKeys(others / "prefill-0.key_secret", world.keys / "peers").towards("decode-0")
    wrong_server = PeerKeys(_own(world, "prefill-0")[0], others).towards("decode-0")
    for secure in (None, wrong_key, wrong_server):
        with Socket(world, secure) as stranger:
            stranger.release(room)
            stranger.pull(room)
            assert not stranger.answered(REFUSED_S)
    with Socket(world, PeerKeys(*_own(world, "prefill-0")).towards("decode-0")) as known:
        known.pull(room)
        assert known.answered(WAIT_S), "its room is still open"


def test_a_lane_takes_nobody_else_for_its_decode_engine(world, prefill):
    missing = []
    keys = PeerKeys(*_own(world, "prefill-0"))
    lane = lane_of(world, prefill, keys, "prefill-0", missing)
    load, room = prefill.load(PAGES), world.open_room()
    lane.submit(load, room, PAGES)
    load.close_part()
    until_acknowledged(load)
    assert missing and missing[0][:2] == (0, PAGES) and load.prefix == 0
    with pytest.raises(KeyFileError, match="decode-7.key"):
        keys.towards("decode-7/dp0")


def test_keys_come_and_go_while_the_page_server_runs(world):
    keys, public = PeerKeys(*_own(world, "prefill-0")), world.keys / "peers/prefill-0.key"
    room = world.open_room()
    with Socket(world, keys.towards("decode-0")) as standing:
        standing.pull(room)
        assert standing.answered(WAIT_S)
        aside = public.rename(world.keys / "prefill-0.key")

        def ignored() -> bool:
            standing.pull(room)
            return not standing.answered(REFUSED_S)

        eventually(ignored, "a standing connection is ignored")
        with Socket(world, keys.towards("decode-0")) as later:
            later.pull(room)
            assert not later.answered(REFUSED_S)
            aside.rename(public)
            assert later.answered(WAIT_S), "it tries again by itself"
        standing.pull(room)
        assert standing.answered(WAIT_S)


@pytest.fixture
def environment(monkeypatch):
    for name, value in {"DUALPATH_ENABLED": "1", "DUALPATH_ENGINE_ID": "prefill-0"}.items():
        monkeypatch.setenv(name, value)
    settings.cache_clear()
    yield monkeypatch.setenv
    settings.cache_clear()


@pytest.mark.parametrize("host", ["192.168.1.5", "10.0.0.1", "0.0.0.0", "::", "fd00::1", "node-1"])
def test_an_engine_that_others_can_reach_refuses_to_start_without_keys(environment, host):
    environment("DUALPATH_HOST", host)
    with pytest.raises(ValueError, match=f"DUALPATH_HOST is '{host}'.*DUALPATH_PEER_KEYS"):
        settings()
    settings.cache_clear()
    environment("DUALPATH_KEY_FILE", "/k/a.key_secret")
    environment("DUALPATH_SCHEDULER_KEY_FILE", "/k/scheduler.key")
    with pytest.raises(ValueError, match="DUALPATH_PEER_KEYS"):
        settings()
    settings.cache_clear()
    environment("DUALPATH_PEER_KEYS", "/k/peers")
    assert settings().peer_keys == Path("/k/peers")


def test_an_engine_on_a_trusted_network_says_so(environment):
    environment("DUALPATH_HOST", "192.168.1.5")
    environment("DUALPATH_TRUSTED_NETWORK", "1")
    assert settings().peer_keys is None


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "127.8.9.1", "::1", "[::1]", "localhost"])
def test_on_loopback_nothing_is_asked_for(environment, host):
    environment("DUALPATH_HOST", host)
    assert settings().host == host


def test_half_a_configuration_is_refused(environment, tmp_path):
    environment("DUALPATH_PEER_KEYS", "/k/peers")
    with pytest.raises(ValueError, match="DUALPATH_PEER_KEYS is '/k/peers' without DUALPATH_KEY_FILE"):
        settings()
    environment("DUALPATH_KEY_FILE", "/k/a.key_secret")
    settings.cache_clear()
    with pytest.raises(ValueError, match="give both DUALPATH_KEY_FILE"):
        settings()
    environment("DUALPATH_SCHEDULER_KEY_FILE", "/k/scheduler.key")
    file = tmp_path / "decode-0.key"
    file.write_text("")
    environment("DUALPATH_PEER_KEYS", str(file))
    settings.cache_clear()
    with pytest.raises(ValueError, match="a file: name the directory"):
        settings()


def test_an_empty_directory_or_an_unusable_key_is_refused(tmp_path):
    generate(tmp_path / "keys", ["a"])
    (tmp_path / "none").mkdir()
    with pytest.raises(KeyFileError, match="nobody could connect"):
        PeerKeys(tmp_path / "keys/peers/a.key_secret", tmp_path / "none")
    with pytest.raises(KeyFileError, match="dualpath keys generate"):
        PeerKeys(tmp_path / "keys/peers/b.key_secret", tmp_path / "keys/peers")
