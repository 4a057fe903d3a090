"""The router's question to a real scheduler process, over CURVE and without an answer."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from scheduler_vocabulary import heartbeat

from dualpath_sgl.launch.processes.ports import FreePorts
from dualpath_sgl.launch.processes.process import ManagedProcess
from dualpath_sgl.router import placement
from dualpath_sgl.router.placement import PlacementClient, SchedulerAway
from scheduler_svc.wire.client import SchedulerClient
from scheduler_svc.wire.keys import generate
from scheduler_svc.wire.protocol import Place

WAIT_S = 30.0


@contextmanager
def scheduler(folder: Path, *options: str) -> Iterator[tuple[ManagedProcess, str]]:
    address = f"tcp://127.0.0.1:{FreePorts('127.0.0.1').take()}"
    argv = [sys.executable, "-m", "scheduler_svc", f"--bind={address}", *options]
    process = ManagedProcess("scheduler", argv, os.environ, folder / "scheduler.log")
    process.start()
    try:
        yield process, address
    finally:
        process.send_group(signal.SIGKILL)
        process.finish(time.monotonic() + WAIT_S)


def asked() -> Place:
    return Place(request_id=uuid.uuid4().hex, prompt_tokens=100)


async def placed(client: PlacementClient):
    """As soon as the scheduler answers."""
    deadline_s = time.monotonic() + WAIT_S
    while True:
        try:
            return await client.place(asked())
        except SchedulerAway as away:
            assert time.monotonic() < deadline_s, f"not placed: {away}"
            await asyncio.sleep(0.05)


def register(address: str, key_files: tuple[Path, Path] | None = None) -> None:
    with SchedulerClient(address, curve_key_files=key_files) as peer:
        for name in ("p0", "d0"):
            peer.send(heartbeat(name))
        assert len(peer.status(WAIT_S).engines) == 2


def test_with_keys_it_is_placed_and_with_a_strangers_keys_it_is_away(tmp_path):
    generate(tmp_path, ["router"])
    generate(tmp_path, ["engines"], ["p0", "d0"])
    generate(tmp_path / "strangers", ["router"])
    options = (
        f"--curve-server-key-file={tmp_path / 'scheduler.key_secret'}",
        f"--authorized-keys-dir={tmp_path / 'peers'}",
    )
    own = (tmp_path / "peers/router.key_secret", tmp_path / "scheduler.key")
    stranger = (tmp_path / "strangers/peers/router.key_secret", tmp_path / "scheduler.key")

    async def ask(address: str) -> None:
        client, refused = PlacementClient(address, own), PlacementClient(address, stranger)
        assert (await placed(client)).prefill.engine_id == "p0"
        with pytest.raises(SchedulerAway, match="not connected"):
            await refused.place(asked())
        client.close()
        refused.close()

    with scheduler(tmp_path, *options) as (_, address):
        register(address, (tmp_path / "peers/engines.key_secret", tmp_path / "scheduler.key"))
        asyncio.run(ask(address))


def test_many_questions_at_once_get_their_own_answers(tmp_path):
    async def ask(address: str) -> None:
        client = PlacementClient(address, None)
        await placed(client)
        questions = [asked() for _ in range(200)]
        answers = await asyncio.gather(*(client.place(question) for question in questions))
        assert [answer.request_id for answer in answers] == [one.request_id for one in questions]
        assert len({answer.room for answer in answers}) == len(questions)
        client.close()

    with scheduler(tmp_path) as (_, address):
        register(address)
        asyncio.run(ask(address))


def test_a_hung_scheduler_is_asked_once_and_then_left_alone_until_it_answers_a_ping(tmp_path, monkeypatch):
    monkeypatch.setattr(placement, "PLACE_TIMEOUT_S", 0.3)
    monkeypatch.setattr(placement, "PING_INTERVAL_S", 0.1)

    async def ask(process: ManagedProcess, address: str) -> None:
        client = PlacementClient(address, None)
        await placed(client)
        process.send(signal.SIGSTOP)
        with pytest.raises(SchedulerAway):
            await client.place(asked())
        monkeypatch.setattr(client, "_send", None)  # the next one must not even be sent
        with pytest.raises(SchedulerAway):
            await client.place(asked())
        monkeypatch.undo()
        process.send(signal.SIGCONT)
        await placed(client)
        client.close()

    with scheduler(tmp_path) as (process, address):
        register(address)
        asyncio.run(ask(process, address))


def test_a_scheduler_without_engines_is_away_by_its_own_word(tmp_path):
    async def ask(address: str) -> str:
        client = PlacementClient(address, None)
        reason = "not connected"
        while "not connected" in reason:
            with pytest.raises(SchedulerAway) as away:
                await client.place(asked())
            reason = str(away.value)
            await asyncio.sleep(0.05)
        client.close()
        return reason

    with scheduler(tmp_path) as (_, address):
        assert asyncio.run(ask(address)) == "scheduler: no_engine"
