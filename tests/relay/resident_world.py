"""A decode engine's rank without the engine: memory with objects in it, and the server that gives them away."""

from __future__ import annotations

import ctypes
import itertools
import os
import random
from typing import Any

import msgspec
import torch

from dualpath_sgl.control.channel import ControlChannel
from dualpath_sgl.evals.relay.world import HOST
from dualpath_sgl.lanes.forward import Forwarder
from dualpath_sgl.lanes.peer_keys import PeerKeys
from dualpath_sgl.relay.client.relays import Helper, Kind
from dualpath_sgl.relay.memory import Memory
from dualpath_sgl.relay.resident.index import Index
from dualpath_sgl.relay.resident.lives import Lives
from dualpath_sgl.relay.resident.server import ResidentServer
from scheduler_svc.wire.protocol import Mode, RankInfo, Role, Workload

SIZES = [256 * 1024] * 16
KV = "objects-1"

_numbers = itertools.count()
_never_destroyed: list[Forwarder] = []
"""Mooncake's destructor holds the interpreter for a second."""


class Wanted:
    """Objects that no store has, and memory that they shall come into."""

    def __init__(self, holder: Holder, client: Any) -> None:
        """`client`: of the store; it registers the memory."""
        self.keys, self.sizes, self.byte_count = holder.keys, SIZES, sum(SIZES)
        self._bytes = holder.bytes
        self._memory = Memory(self.byte_count)
        self.address = self._memory.address
        self.pointers = list(itertools.accumulate(SIZES, initial=self.address))[:-1]
        assert client.register_buffer(self.address, self.byte_count) == 0

    def are_there(self) -> bool:
        return ctypes.string_at(self.address, self.byte_count) == self._bytes


class Holder:
    def __init__(self, name: str = "decode-0", keys: PeerKeys | None = None) -> None:
        self.name = name
        number = next(_numbers)
        self.keys = [f"{os.getpid()}-held-{number}-{index}" for index in range(len(SIZES))]
        self.bytes = random.Random(number).randbytes(sum(SIZES))
        self._memory = Memory(sum(SIZES))
        ctypes.memmove(self._memory.address, self.bytes, sum(SIZES))
        forwarder = Forwarder(HOST, "tcp", "", [])
        _never_destroyed.append(forwarder)
        forwarder.register(self._memory.address, self._memory.byte_count)
        index, lives = Index(), Lives(1, 1)
        addresses = list(itertools.accumulate(SIZES, initial=self._memory.address))[:-1]
        index.note(self.keys, addresses, SIZES, lives.now(torch.tensor([0])))
        self.server = ResidentServer(HOST, 0, index, forwarder.mooncake_address, self._memory.address, keys)
        self.server.start()
        self.helper = Helper(name, self.server.endpoint, Kind.RESIDENT)
        self._channel: ControlChannel | None = None

    def registers(self, address: str, key_files: tuple | None = None, objects: str = KV) -> None:
        """With the scheduler there."""
        self._info = RankInfo(
            engine_id=self.name, role=Role.DECODE, url="http://127.0.0.1:1", fingerprint="relay",
            page_size=16, page_bytes=1000, mode=Mode.RELAY, objects=objects, fetch_endpoint=self.server.endpoint,
        )  # fmt: skip
        self._channel = ControlChannel(address, self._info, key_files)
        self._channel.serve(Workload, print, print)

    def moves_to(self, other: Holder) -> None:
        """It answers where that one does."""
        assert self._channel is not None
        self._channel.send(msgspec.structs.replace(self._info, fetch_endpoint=other.server.endpoint))

    def leaves(self) -> None:
        """Its storage is detached."""
        assert self._channel is not None
        self._channel.send(msgspec.structs.replace(self._info, objects=None, fetch_endpoint=None))

    def end(self) -> None:
        if self._channel is not None:
            self._channel.stop()
        self.server.stop()
        self.server.join()
