"""A real store with objects in it, relays as processes, and the loader of a prefill engine; all on this host."""

from __future__ import annotations

import copy
import ctypes
import hashlib
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dualpath_sgl.lanes.forward import Forwarder, bound_mooncakes_patience
from dualpath_sgl.lanes.peer_keys import Secure
from dualpath_sgl.launch.processes.ports import FreePorts
from dualpath_sgl.limits.read_limit import ReadLimit
from dualpath_sgl.relay.client.claims import Pointers
from dualpath_sgl.relay.client.counts import Counts
from dualpath_sgl.relay.client.lane import RelayLane
from dualpath_sgl.relay.client.loader import Loader
from dualpath_sgl.relay.client.memory.destinations import Destinations
from dualpath_sgl.relay.client.memory.transports import Transports
from dualpath_sgl.relay.client.options import Options
from dualpath_sgl.relay.client.relays import Helper, Relays
from dualpath_sgl.relay.memory import Memory
from dualpath_sgl.relay.wire import Hello

HOST = "127.0.0.1"
MIB = 2**20
WAIT_S = 30.0
PUT_AT_A_TIME = 64


def eventually(true: Callable[[], object], what: str, within_s: float = WAIT_S) -> None:
    """Raises TimeoutError naming `what`."""
    until_s = time.monotonic() + within_s
    while not true():
        if time.monotonic() > until_s:
            raise TimeoutError(f"not in {within_s:g} s: {what}")
        time.sleep(0.01)


class Child:
    """A process that says when it is ready, on its standard output."""

    def __init__(self, command: Sequence[str], ready: str | None, env: dict[str, str] | None = None) -> None:
        """Raises RuntimeError with its errors when it ends before."""
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self.process: subprocess.Popen[str] = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "MC_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1", **(env or {})},
        )
        self.greeting = self.says(ready) if ready else ""

    def says(self, word: str) -> str:
        """The next line with `word` in it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if word in line:
                return line
        raise RuntimeError(f"{self.process.args!r} ended: {self.log()}")

    def log(self) -> str:
        self._errors.seek(0)
        return self._errors.read()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        if self.process.poll() is None:
            self.send(signal.SIGCONT)
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._errors):
            assert stream is not None
            stream.close()


class RelayProcess(Child):
    def __init__(
        self,
        name: str,
        settings: dict[str, object],
        program: Sequence[str] = ("-m", "dualpath_sgl.relay"),
        env: dict[str, str] | None = None,
    ) -> None:
        """`settings`: of `dualpath_sgl.relay.settings`, without `name`."""
        self.name = name
        variables = {
            f"DUALPATH_RELAY_{key.upper()}": str(value) for key, value in {"name": name, **settings}.items()
        }
        super().__init__([sys.executable, *program], "relay ready at", {**variables, **(env or {})})
        self.endpoint = self.greeting.split()[-1]
        self.helper = Helper(name, self.endpoint)


class Store:
    """Mooncake's master and one node with memory, and a client of it."""

    def __init__(self, byte_count: int) -> None:
        ports = FreePorts(HOST)
        port, metrics_port = ports.take(), ports.take()
        self.master = f"{HOST}:{port}"
        self._children = [
            Child(
                [
                    str(Path(sys.executable).parent / "mooncake_master"),
                    f"--rpc_address={HOST}",
                    f"--rpc_port={port}",
                    f"--metrics_host={HOST}",
                    f"--metrics_port={metrics_port}",
                ],
                None,
            )
        ]
        eventually(lambda: _listens(port), "Mooncake's master listens")
        self.node = Child(
            [
                sys.executable,
                "-m",
                "dualpath_sgl.launch.processes.store_node",
                f"--master={self.master}",
                f"--segment-bytes={byte_count}",
                f"--host={HOST}",
            ],
            "store node ready",
        )
        self._children.append(self.node)
        self.client = self.new_client()

    def new_client(self) -> Any:
        from mooncake.store import MooncakeDistributedStore

        client = MooncakeDistributedStore()
        code = client.setup(HOST, "P2PHANDSHAKE", 0, 16 * MIB, "tcp", "", self.master)
        if code != 0:
            raise RuntimeError(f"Mooncake store set-up failed with code {code}")
        return client

    def end(self) -> None:
        for child in reversed(self._children):
            child.end()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


_numbers = itertools.count()


class Objects:
    """Stored objects, and memory of the engine's that they shall come into."""

    def __init__(self, client: Any, sizes: Sequence[int], stored: Sequence[int] | None = None) -> None:
        """`stored`: the sizes they have in the store, when those are others."""
        number = next(_numbers)
        stored = list(stored or sizes)
        self.keys = [f"{os.getpid()}-{number}-object-{index}" for index in range(len(sizes))]
        self.sizes = list(sizes)
        self.byte_count = sum(sizes)
        self._client = client
        self._target = Memory(self.byte_count)
        self.address = self._target.address
        self.pointers = list(itertools.accumulate(sizes, initial=self.address))[:-1]
        source = Memory(sum(stored))
        ctypes.memmove(source.address, random.Random(number).randbytes(sum(stored)), sum(stored))
        sources = list(itertools.accumulate(stored, initial=source.address))[:-1]
        for registered in (source, self._target):
            assert client.register_buffer(registered.address, registered.byte_count) == 0
        for first in range(0, len(sizes), PUT_AT_A_TIME):
            some = slice(first, first + PUT_AT_A_TIME)
            codes = client.batch_put_from(self.keys[some], sources[some], stored[some])
            assert not any(codes), codes
        self._digests = [_digest(at, size) for at, size in zip(sources, stored, strict=True)]
        assert client.unregister_buffer(source.address) == 0

    def wrong(self) -> list[int]:
        """Objects whose bytes in the engine's memory are not those that were stored."""
        places = zip(self.pointers, self.sizes, self._digests, strict=True)
        return [index for index, (at, size, digest) in enumerate(places) if _digest(at, size) != digest]

    def for_another_rank(self) -> Objects:
        """The same objects, and memory of its own for them."""
        other = copy.copy(self)
        other._target = Memory(self.byte_count)
        other.address = other._target.address
        other.pointers = [at - self.address + other.address for at in self.pointers]
        assert self._client.register_buffer(other.address, other.byte_count) == 0
        return other

    def forget(self) -> None:
        ctypes.memset(self.address, 0, self.byte_count)

    def free(self) -> None:
        """They leave the store, too."""
        self._client.unregister_buffer(self.address)
        for key in self.keys:
            self._client.remove(key, True)


def _digest(address: int, byte_count: int) -> bytes:
    return hashlib.sha256(ctypes.string_at(address, byte_count)).digest()


_never_destroyed: list[Transports] = []
"""Mooncake's destructor holds the interpreter for a second, and whatever is measured meanwhile."""


class Prefill:
    """One rank of a prefill engine: a client of the store over a link of its own, and a loader."""

    def __init__(
        self,
        client: Any,
        helpers: Sequence[Helper],
        *,
        rate: float = 0,
        hello: Hello | None = None,
        is_shared: Callable[[str], bool] | None = None,
        secure: Callable[[str], Secure] | None = None,
        **options: Any,
    ) -> None:
        """`rate`: bytes a second of its storage link, 0 for as many as come; `options`: of `Options`."""
        bound_mooncakes_patience()
        self._client = client
        self._limit = ReadLimit(rate) if rate else None
        self.own_keys: list[str] = []
        """That its own client was asked for."""
        self.may_read = threading.Event()
        """Its own client waits for it."""
        self.may_read.set()
        self.relays = Relays(helpers)
        self._destinations = Destinations()
        chosen = Options(**options)
        transports = Transports(partial(Forwarder, HOST, "tcp", "", []), chosen.bounce_bytes)
        _never_destroyed.append(transports)
        self.loader = Loader(
            self._read,
            self.relays,
            hello or Hello(engine="prefill-0"),
            transports,
            self._destinations,
            chosen,
            is_shared=is_shared,
            secure=secure,
        )

    @property
    def counts(self) -> Counts:
        return self.loader.counts

    def knows(self, *relays: RelayProcess) -> None:
        """Waits until they may be asked."""
        names = {relay.name for relay in relays}
        eventually(
            lambda: names <= {lane.helper.name for lane in self.loader.lanes_up()}, f"{names} may be asked"
        )

    def lane(self, relay: RelayProcess) -> RelayLane:
        return self.loader._lanes[relay.helper]

    def transport(self, relay: RelayProcess) -> Forwarder:
        """What its memory is read with; it must be known."""
        transport = self.lane(relay)._transport
        assert transport is not None
        return transport

    def load(self, objects: Objects) -> list[int]:
        self._destinations.add(objects.address, objects.byte_count)
        return self.loader.load(objects.keys, objects.pointers, objects.sizes)

    def _read(self, keys: list[str], pointers: list[Pointers], sizes: list[Pointers]) -> Sequence[int]:
        self.may_read.wait()
        begun_s = time.monotonic()
        self.own_keys += keys
        in_blocks = isinstance(pointers[0], Sequence)
        read = self._client.batch_get_into_multi_buffers if in_blocks else self._client.batch_get_into
        got: list[int] = read(keys, pointers, sizes)
        if self._limit is not None:
            self._limit.pace(sum(count for count in got if count > 0), begun_s)
        return got

    def end(self) -> None:
        self.may_read.set()
        self.loader.close()
