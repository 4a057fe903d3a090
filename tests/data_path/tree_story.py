"""The vocabulary of the tests over SGLang's real tree: an engine, its store, and the other engine of a pair.

An `Engine` is one rank of a prefill or a decode engine: SGLang's tree, controller and pools
(sglang_engine.py) with DualPath's hooks, runtime, lanes and page server, all real.  Two things stand in: a
store in memory (ram_store.py), and the channel to the scheduler, so that a test hands over plans itself and
sees what was reported.  The engine of the other role is a `Peer`: its host pool, its forwarding engine, and a
real page server or a real lane.

What a page holds follows from its name: `content` of its hash.  So every page anywhere can be checked.

An engine cannot be taken down again: tests get one through the fixture `engine`, in a process of their own.
"""

from __future__ import annotations

import importlib
import itertools
import json
import logging
import os
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
os.environ.setdefault("MC_LOG_LEVEL", "ERROR")

import data_path_world
import own_process
import torch
from ram_store import RamStore
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.hicache_storage import PoolName, SidecarPoolSpec
from sglang.srt.mem_cache.pool_host.group import PoolEntry
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang_engine import HEAD_DIM, HEADS, LAYERS, SglangEngine

from dualpath_sgl import plugin, runtime
from dualpath_sgl.cpu_profile import plugin as cpu_profile
from dualpath_sgl.lanes.forward import Forwarder
from dualpath_sgl.lanes.page_load import PageLoad
from dualpath_sgl.lanes.page_server import PageServer
from dualpath_sgl.lanes.peer_lane import PeerLane
from dualpath_sgl.pools.host_tree import held_on_host
from dualpath_sgl.pools.integrity import unevictable_pages
from dualpath_sgl.pools.prompt_hash import prompt_hash
from dualpath_sgl.start import config
from scheduler_svc.wire.protocol import Done, Helpers, Path, Plan, Report

logger = logging.getLogger(__name__)

WAIT_S = 30.0
"""How long a test waits for something that must happen before it fails."""
PAGE_TOKENS = 16
STEP_S = 0.002
"""Between two iterations of SGLang's loop."""

_first_tokens = itertools.count(100, 10_000)


def _warm_up() -> None:
    """What every engine needs: late imports, the page hash that SGLang compiles, hooks."""
    importlib.import_module("dualpath_sgl.storage")
    importlib.import_module("sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler")
    get_storage_hash_str(RadixKey(array("q", range(16))), None, page_size=16)
    os.environ |= {"DUALPATH_ENABLED": "1", "DUALPATH_ENGINE_ID": "engine-0"}
    config.settings.cache_clear()
    cpu_profile.activate()
    plugin.activate()
    HookRegistry.apply_hooks()


own_process.WARM_UPS.append(_warm_up)


def prompt(pages: int = 8, page_tokens: int = PAGE_TOKENS, first: int | None = None) -> array:
    """Tokens of `pages` pages and one more; another prompt every time, unless `first` names one."""
    first = next(_first_tokens) if first is None else first
    return array("q", range(first, first + pages * page_tokens + 1))


def content(page_hash: str, page_tokens: int) -> torch.Tensor:
    """What the page of that name holds: K and V, float32 `[2, layers, page_tokens, heads, head_dim]`."""
    chance = torch.Generator().manual_seed(int(page_hash[:15], 16))
    return torch.rand(2, LAYERS, page_tokens, HEADS, HEAD_DIM, generator=chance)


class SchedulerChannel:
    """Stands in for ControlChannel: keeps what is sent, and brings plans on a thread of its own."""

    def __init__(self, _address, engine, _key_files=None) -> None:
        self.described = engine
        """As the scheduler knows this engine."""
        self.connected = True
        self.sent: list[Report | Done] = []

    def serve(self, load, on_plan, on_no_plan, on_helpers, on_loaded=None) -> None:
        self.load = load
        self._on_plan, self._on_no_plan, self._on_helpers = on_plan, on_no_plan, on_helpers

    def stop(self) -> None: ...

    def left(self) -> None: ...

    def send(self, message: Report | Done) -> None:
        self.sent.append(message)

    def bring(self, plan: Plan) -> None:
        """Returns when the plan was handed over; a failure is logged, as by the real channel."""
        self._call(self._on_plan, plan)

    def bring_none(self, room: int) -> None:
        """The scheduler will make no plan for the room."""
        self._call(self._on_no_plan, room)

    def tell(self, helpers: Helpers) -> None:
        """Who may help."""
        self._call(self._on_helpers, helpers)

    def _call(self, handler: Callable[[Any], None], argument: Any) -> None:
        def call() -> None:
            try:
                handler(argument)
            except Exception:
                logger.exception("%r could not be used", argument)

        thread = threading.Thread(target=call, name="dualpath-control")
        thread.start()
        thread.join(WAIT_S)


class Engine:
    """One rank.  `sglang` is SGLang's part; `runtime` DualPath's, None when built with `dualpath=False`: then
    the hooks are there and do nothing, and SGLang's own Mooncake backend reads the store."""

    def __init__(
        self,
        role: str,
        *,
        dualpath: bool = True,
        core: str | None = None,
        page_tokens: int = PAGE_TOKENS,
        host_pages: int = 64,
        device_pages: int = 64,
        policy: str = "wait_complete",
        host_memory: str = "cache",
        eagle: bool = False,
        side_pool: bool = False,
        forwarder: type[Forwarder] = Forwarder,
        parallel: dict[str, int] | None = None,
        settings: dict[str, object] | None = None,
        extra_config: dict[str, object] | None = None,
    ) -> None:
        """`role` is "prefill" or "decode"; `core` SGLang's tree core, "python" or "rust"; `side_pool` gives
        the model a second host pool (a draft model's); `forwarder` is the class of the forwarding engine;
        `settings` are DualPath's by name; `extra_config` goes beside the backend's own into SGLang's extra
        configuration.

        Raises what SGLang or DualPath raises at start.
        """
        torch.set_num_threads(1)
        self.page_tokens, self.policy = page_tokens, policy
        self.store = RamStore()
        self.store.install()
        self.channel: SchedulerChannel | None = None
        if not plugin.activated:
            _warm_up()
        runtime.Forwarder, runtime.ControlChannel = forwarder, self._open_channel
        given = {"scheduler": "tcp://127.0.0.1:1"} | (settings or {})
        os.environ |= {f"DUALPATH_{name.upper()}": str(value) for name, value in given.items()}
        config.settings.cache_clear()
        self.extra_config = {
            "interface_v1": 1,
            "prefetch_threshold": page_tokens,
            "master_server_address": "ram",
        } | (extra_config or {})
        if dualpath:
            self.extra_config |= {
                "backend_name": "dualpath",
                "module_path": "dualpath_sgl.storage",
                "class_name": "DualPathStorage",
            }
        self.sglang = SglangEngine(
            role,
            backend=self.extra_config,
            core=core or os.environ.get("CORE", "python"),
            page_tokens=page_tokens,
            host_pages=host_pages,
            device_pages=device_pages,
            policy=policy,
            host_memory=host_memory,
            eagle=eagle,
            parallel=parallel or {},
        )
        self.tree, self.controller = self.sglang.tree, self.sglang.controller
        if side_pool:
            self._add_side_pool(host_pages)
        # SGLang keeps half of the pool free of prefetches: small pools would hardly be used.
        self.controller.prefetch_capacity_limit = self.pool.logical_size

    def _add_side_pool(self, host_pages: int) -> None:
        pool = data_path_world.host_pool(host_pages, self.page_tokens, LAYERS)
        self.tree.register_sidecar_pool(
            SidecarPoolSpec(PoolName.DRAFT, indices_from_pool=PoolName.KV),
            PoolEntry(PoolName.DRAFT, pool, self.sglang.kv, lambda layer: layer),
        )

    def _open_channel(self, *args, **kwargs) -> SchedulerChannel:
        self.channel = SchedulerChannel(*args, **kwargs)
        return self.channel

    # -- what it is made of ---------------------------------------------------------------------

    @property
    def runtime(self) -> runtime.Runtime | None:
        return runtime.current()

    @property
    def side(self):
        """DualPath's side of the role."""
        return self.runtime.side

    @property
    def pool(self):
        """SGLang's host pool of the KV."""
        return self.sglang.host_pool

    @property
    def sent(self) -> list[Report | Done]:
        """To the scheduler, in order."""
        return self.channel.sent

    @property
    def held(self) -> int:
        """As the next heartbeat would say."""
        return self.channel.load().held

    def reports(self, req: Req) -> list[Report]:
        return [m for m in self.sent if isinstance(m, Report) and m.room == req.bootstrap_room]

    def dones(self, req: Req) -> list[Done]:
        return [m for m in self.sent if isinstance(m, Done) and m.room == req.bootstrap_room]

    # -- time -------------------------------------------------------------------------------------

    def step(self) -> None:
        """One iteration of SGLang's loop."""
        self.sglang.step()

    def goes_on(self, seconds: float) -> None:
        self.within(seconds, lambda: False)

    def within(self, seconds: float, condition: Callable[[], object]) -> bool:
        """Whether `condition` came true while SGLang's loop went on."""
        deadline_s = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline_s:
                return False
            self.step()
            time.sleep(STEP_S)
        return True

    def until(self, condition: Callable[[], object], what: str, seconds: float = WAIT_S) -> None:
        assert self.within(seconds, condition), f"{what}: did not happen in {seconds:g} s"

    # -- pages ------------------------------------------------------------------------------------

    def hashes(self, tokens: Sequence[int]) -> list[str]:
        """Names of the whole pages of `tokens`."""
        return get_storage_hash_str(self.sglang.key(tokens), None, page_size=self.page_tokens)

    def contents(self, tokens: Sequence[int]) -> list[torch.Tensor]:
        return [content(name, self.page_tokens) for name in self.hashes(tokens)]

    def keys(self, tokens: Sequence[int]) -> list[list[str]]:
        """Of each page the keys of its objects in the store: K, V, and those of a side pool."""
        backend, names = self.sglang.backend, self.hashes(tokens)
        slots = torch.zeros(len(names) * self.page_tokens, dtype=torch.int64)
        keys, _, _ = backend._batch_preprocess(backend._tag_keys(names), slots)
        return [self._with_side_pool(keys[page * 2 : page * 2 + 2]) for page in range(len(names))]

    def _with_side_pool(self, keys: list[str]) -> list[str]:
        if not self.tree.sidecar_pool_specs:
            return keys
        return keys + [key[: -len("_k")] + "_draft" + key[-len("_k") :] for key in keys]

    def store_holds(self, tokens: Sequence[int], pages: int | None = None) -> None:
        """The store holds the first `pages` pages of the prompt, or all of them."""
        for page, keys in list(zip(self.contents(tokens), self.keys(tokens), strict=True))[:pages]:
            halves = [half.numpy().tobytes() for half in page] * 2  # a side pool's are the same
            self.store.objects.update(zip(keys, halves, strict=False))

    def computed(self, tokens: Sequence[int], pages: int | None = None) -> None:
        """A request with this prompt has run: the first `pages` pages are on the device, and on their way
        into the host pool and the store."""
        assert self.sglang.compute(tokens, self.contents(tokens)[:pages]), "no device memory"

    def page_numbers(self, slots: torch.Tensor) -> list[int]:
        """Pages of the host pool behind token slots."""
        return [slot // self.page_tokens for slot in slots.tolist()[:: self.page_tokens]]

    def holds(self, slots: torch.Tensor, names: Sequence[str]) -> list[bool]:
        """Of each page whether the host pool holds what its name says."""
        return [
            torch.equal(self.pool.kv_buffer[:, page], content(name, self.page_tokens))
            for page, name in zip(self.page_numbers(slots), names, strict=True)
        ]

    def in_tree(self, tokens: Sequence[int]) -> list[bool]:
        """The prompt's pages that SGLang's tree holds on the host, without a gap: is each right?"""
        held = held_on_host(self.tree, self.sglang.request(tokens))
        names = self.hashes(tokens)[: held.tokens // self.page_tokens]
        return self.holds(held.host_indices(), names) if names else []

    def take_host_pages(self, pages: int | None = None) -> torch.Tensor:
        """Somebody else gets `pages` pages of the host pool (all that are free) and writes into them."""
        tokens = self.pool.available_size() if pages is None else pages * self.page_tokens
        slots = self.controller.mem_pool_host.alloc(tokens // self.page_tokens * self.page_tokens)
        assert slots is not None, "not so many free pages"
        for page in self.page_numbers(slots):
            self.pool.kv_buffer[:, page] = -1.0
        return slots

    def evict_device(self) -> None:
        """Other traffic drives everything that may go off the device."""
        self.tree.evict(EvictParams(num_tokens=self.sglang.allocator.size))

    def evict_host(self) -> None:
        """Other traffic drives everything that may go out of the host pool."""
        self.tree.evict_host(self.pool.logical_size)

    def unevictable(self) -> tuple[int, int]:
        """Host and device pages that stay when everything that may be evicted was."""
        return unevictable_pages(self.tree, self.pool)

    def becomes_idle(self) -> None:
        """DualPath lets go of everything, and every page can be given back."""
        self.until(lambda: self.held == 0, "nothing is held")
        if not self.within(WAIT_S, lambda: self.unevictable() == (0, 0)):
            host, device = self.unevictable()
            raise AssertionError(f"{host} host pages and {device} device pages can never be evicted")

    # -- one request --------------------------------------------------------------------------------

    def arrives(self, tokens: Sequence[int], room: int | None = None) -> Req:
        """A request comes in; DualPath reports it."""
        req = self.sglang.request(tokens, room)
        if self.sglang.role == "decode":
            self.sglang.queue.add(req)
        else:
            self.sglang.scheduler._prefetch_kvcache(req)
            self.sglang.scheduler.waiting_queue.append(req)
        return req

    def planned(self, req: Req, peer: Peer | None, pages: int, local: int = 0, decode_local: int = 0) -> Plan:
        """The scheduler plans that the DE forwards all `pages` of the prompt beyond the PE's `local` ones.

        `peer` is the other engine; None where it does not matter.
        """
        endpoint = peer.endpoint if peer is not None and peer.server else "tcp://127.0.0.1:1"
        if self.sglang.role == "decode":
            endpoint = self.runtime.server.endpoint
        plan = Plan(
            room=req.bootstrap_room,
            path=Path.DECODE,
            prefill_id="prefill-0",
            decode_id="decode-0",
            prefill_local_pages=local,
            decode_local_pages=decode_local,
            hit_pages=pages,
            split_page=pages,
            decode_endpoints=(endpoint,),
            policy="decode",
        )
        self.channel.bring(plan)
        return plan

    def aborts(self, req: Req) -> None:
        """The client leaves."""
        self.sglang.abort(req)

    def finishes(self, req: Req) -> None:
        """An admitted request has had its tokens."""
        self.sglang.finish(req)

    def loading(self, req: Req) -> bool:
        """SGLang has a prefetch of the request under way."""
        return self.tree.has_ongoing_prefetch(req.cache_request_handle)

    def admitted(self, req: Req) -> bool:
        """SGLang's look at a waiting request (PE: the batch would take it; DE: it has left the queue)."""
        if self.sglang.role == "decode":
            return all(entry.req is not req for entry in self.sglang.queue.queue)
        return self.tree.check_prefetch_progress(req.cache_request_handle)

    # -- the engine ---------------------------------------------------------------------------------

    def flush(self) -> bool:
        """SGLang's `/flush_cache`, as soon as it counts as idle; whether it did within WAIT_S."""
        return self.within(WAIT_S, self.sglang.scheduler.flush_cache)

    def detach(self) -> tuple[bool, str]:
        return self.tree.detach_storage_backend()

    def attach(self, policy: str | None = None) -> tuple[bool, str]:
        return self.tree.attach_storage_backend(
            "dynamic",
            json.dumps(self.extra_config),
            served_model_name="dummy",
            hicache_storage_prefetch_policy=policy,
        )


class Peer:
    """The engine of the other role: a host pool whose pages fit, a forwarding engine, and by `role` a page
    server ("decode") or a lane to the engine under test ("prefill")."""

    _made: ClassVar[list[Peer]] = []
    """Mooncake takes a second to end an engine that is forgotten; the test's process just ends."""

    def __init__(
        self,
        engine: Engine,
        *,
        pages: int = 64,
        forwarder: type[Forwarder] = Forwarder,
        peer_timeout_s: float = 3.0,
        lease_s: float = 30.0,
        subscribe_timeout_s: float = 10.0,
    ) -> None:
        self._made.append(self)
        self._engine = engine
        self.rank = data_path_world.Rank(pages, forwarder, engine.page_tokens, LAYERS)
        assert self.rank.page_bytes == engine.runtime.page_bytes
        fingerprint = engine.runtime.fingerprint
        self.server: PageServer | None = None
        self.lane: PeerLane | None = None
        self.missing: list[tuple[int, int, str]] = []
        """Of a lane: pages `[first, end)` that did not come, and why."""
        if engine.sglang.role == "prefill":
            self.server = PageServer(
                "127.0.0.1", self.rank.forwarder.mooncake_address, fingerprint, lease_s, subscribe_timeout_s
            )
            self.endpoint = self.server.endpoint
            self.server.start()
        else:
            self.lane = PeerLane(
                engine.runtime.server.endpoint,
                self.rank.forwarder,
                fingerprint,
                peer_timeout_s,
                self._on_missing,
            )
            self.lane.start()

    def _on_missing(self, _load: PageLoad, first: int, end: int, reason: str) -> None:
        self.missing.append((first, end, reason))

    # -- as a decode engine -------------------------------------------------------------------------

    def opens(self, req: Req, first_page: int = 0, of: str | None = None) -> None:
        """The DE got the plan: it offers pages from `first_page` on, of the prompt with the hash `of` (the
        request's own)."""
        self.server.offer(req.bootstrap_room, first_page, of or prompt_hash(req))

    def publishes(
        self, req: Req, tokens: Sequence[int], first: int = 0, end: int | None = None
    ) -> torch.Tensor:
        """Pages `[first, end)` of the prompt are whole in this DE's pool; their slots."""
        names = self._engine.hashes(tokens)[first:end]
        slots = self.rank.pages(len(names))
        self.rank.fill(slots, [content(name, self._engine.page_tokens) for name in names])
        self.server.publish(req.bootstrap_room, *self.rank.blocks(slots))
        return slots

    def ends(self, req: Req, reason: str | None = None) -> None:
        self.server.end(req.bootstrap_room, reason)

    def has(self, req: Req, tokens: Sequence[int], first_page: int = 0) -> None:
        """The DE holds all pages from `first_page` on and offers them."""
        self.opens(req, first_page)
        self.publishes(req, tokens, first_page)
        self.ends(req)

    # -- as a prefill engine ------------------------------------------------------------------------

    def pulls(self, room: int, pages: int, first_page: int = 0, of: str | None = None) -> PageLoad:
        """A PE wants `pages` pages of the room, which it takes for the prompt with the hash `of`."""
        load = self.rank.load(pages, first_page)
        self.lane.submit(load, room, pages, of)
        load.close_part()
        return load

    def wrong_pages(self, load: PageLoad, tokens: Sequence[int]) -> list[torch.Tensor]:
        """Of the pages that it took for whole those that hold something else than the prompt's."""
        names = self._engine.hashes(tokens)[load.first_page :]
        landed = self.rank.landed(load, 0, load.prefix)
        return [
            page
            for page, name in zip(landed, names, strict=False)
            if not torch.equal(page, content(name, self._engine.page_tokens))
        ]

    def wrong(self, load: PageLoad, tokens: Sequence[int]) -> int:
        """How many."""
        return len(self.wrong_pages(load, tokens))
