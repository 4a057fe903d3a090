"""SGLang's tree as a decode engine has it, whose pages come and go, and loads that want them by key."""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import time
from array import array

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

import torch
from relay_world import Loading, Scene
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang_tree import WAIT_S, Tree

from dualpath_sgl.evals.relay.world import HOST, Prefill, eventually
from dualpath_sgl.lanes.forward import Forwarder
from dualpath_sgl.relay.client.relays import Helper, Kind
from dualpath_sgl.relay.memory import Memory

PAGE_TOKENS = 16
DEVICE_PAGES = 96
HOST_PAGES = 2 * DEVICE_PAGES


def store_at(master: str) -> None:
    """Where SGLang's backend looks for the store."""
    for name, value in {
        "MASTER": master,
        "PROTOCOL": "tcp",
        "TE_META_DATA_SERVER": "P2PHANDSHAKE",
        "GLOBAL_SEGMENT_SIZE": "0",
        "LOCAL_HOSTNAME": HOST,
    }.items():
        os.environ[f"MOONCAKE_{name}"] = value


class DecodeTree(Tree):
    def __init__(self, master: str, core: str = "python") -> None:
        """`master`: of the store.  In a process of its own."""
        store_at(master)
        names = {
            "backend_name": "relay",
            "module_path": "dualpath_sgl.relay.client.store",
            "class_name": "RelayStore",
            "interface_v1": 1,
        }
        super().__init__(
            "full",
            PAGE_TOKENS,
            "dynamic",
            names,
            role="decode",
            core=core,
            device_tokens=DEVICE_PAGES * PAGE_TOKENS,
        )
        self.server = self.backend._serving.server
        self.helper = Helper("decode-0", self.server.endpoint, Kind.RESIDENT)
        self.kv = self.allocator.get_kvcache()
        self.bytes_of: dict[str, bytes] = {}
        """Of each key."""

    def compute(self, tokens: list[int]) -> None:
        """A request with these tokens ends: its whole pages enter the tree, and are written through.

        The bytes of a page depend on the tokens up to its end and on nothing else.
        """
        key = RadixKey(array("q", tokens)).page_aligned(PAGE_TOKENS)
        missing = len(key) - self.allocator.available_size()
        if missing > 0:
            self.settles()  # a page that is being copied to the host cannot be evicted
            self.tree.evict(EvictParams(num_tokens=missing))
        slots = self.allocator.alloc(len(key))
        names = self.names(tokens)
        for end in range(PAGE_TOKENS, len(key) + 1, PAGE_TOKENS):
            chance = torch.Generator().manual_seed(hash(tuple(tokens[:end])) % 2**63)
            rows = slots[end - PAGE_TOKENS : end]
            buffers = (*self.kv.k_buffer, *self.kv.v_buffer)
            page = torch.rand((len(buffers), *buffers[0][rows].shape), generator=chance)
            for buffer, part in zip(buffers, page, strict=True):
                buffer[rows] = part
            number, layers = end // PAGE_TOKENS - 1, len(self.kv.k_buffer)
            self.bytes_of[names[2 * number]] = page[:layers].numpy().tobytes()
            self.bytes_of[names[2 * number + 1]] = page[layers:].numpy().tobytes()
        self.tree.insert(InsertParams(key=key, value=slots))

    def step(self) -> None:
        self.tree.check_hicache_events()

    def settles(self) -> None:
        """Everything is in host memory and in the store."""
        until_s = time.monotonic() + WAIT_S
        while self.tree.ongoing_write_through or self.tree.ongoing_backup:
            self.step()
            assert time.monotonic() < until_s
            time.sleep(0.002)

    def evict(self, pages: int) -> None:
        """From the device, and what has no other place from the host."""
        self.tree.evict(EvictParams(num_tokens=pages * PAGE_TOKENS))
        self.tree.evict_host(pages * PAGE_TOKENS)

    def flush(self) -> None:
        self.settles()
        self.tree.reset()
        self.allocator.clear()  # as SGLang's scheduler does

    def names(self, tokens: list[int]) -> list[str]:
        """Keys in the store of the whole pages of `tokens`."""
        hashes = self.hashes(tokens)
        indices = torch.arange(0, len(hashes) * PAGE_TOKENS)
        return self.backend._batch_preprocess(self.backend._tag_keys(hashes), indices)[0]

    @property
    def part_bytes(self) -> int:
        """Of each object."""
        return self.controller.storage_host_pool.get_page_buffer_element_size()


class Wanted:
    """Objects that a prefill engine asks for, and memory for them."""

    def __init__(self, client, keys: list[str], size: int) -> None:
        self.keys, self.sizes = keys, [size] * len(keys)
        self.byte_count = size * len(keys)
        memory = self._memory = Memory(self.byte_count)
        self.address = memory.address
        self.pointers = list(itertools.accumulate(self.sizes, initial=memory.address))[:-1]
        self._client = client
        assert client.register_buffer(memory.address, memory.byte_count) == 0

    def wrong(self, bytes_of: dict[str, bytes], results: list[int]) -> list[str]:
        """Keys that are said to have come and whose bytes are others."""
        return [
            key
            for key, address, size, got in zip(self.keys, self.pointers, self.sizes, results, strict=True)
            if got > 0 and ctypes.string_at(address, size) != bytes_of[key]
        ]

    def free(self) -> None:
        self._client.unregister_buffer(self.address)


def stored(scene: Scene):
    """What the store says, for `Loader.exist`."""
    return scene.store.client.batch_is_exist


def asks(scene: Scene, prefill: Prefill, wanted: Wanted) -> list[int]:
    """As SGLang does: first what is there, then all of it."""
    exist = prefill.loader.exist(wanted.keys, stored(scene))
    assert exist == [1] * len(wanted.keys)
    return Loading(lambda: prefill.load(wanted)).ends()


def prefill_of(scene: Scene, tree: DecodeTree, *relays, **options) -> Prefill:
    prefill = scene.prefill_of(
        [tree.helper, *(relay.helper for relay in relays)], least_call_bytes=0, **options
    )
    eventually(lambda: prefill.loader.lanes_up(Kind.RESIDENT), "the decode engine may be asked")
    if relays:
        prefill.knows(*relays)
    return prefill


def prompt(pages: int, seed: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(1000) for _ in range(pages * PAGE_TOKENS)]


def transport_to(prefill: Prefill) -> Forwarder:
    """Through which the prefill engine reads the decode engine's memory."""
    (transport,) = [lane._transport for lane in prefill.loader.lanes_up(Kind.RESIDENT)]
    return transport
