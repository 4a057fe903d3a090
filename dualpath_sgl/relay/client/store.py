"""SGLang's Mooncake backend, whose reads relays take part in.

Everything that HiCache loads, of every pool and in every layout, comes through one method: keys, addresses,
sizes.  storage.py at the top is what engines name; this is all of it that relays need.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
from sglang.srt.mem_cache.storage.mooncake_store.mooncake_store import MooncakeStore

from dualpath_sgl.lanes.forward import Forwarder, bound_mooncakes_patience
from dualpath_sgl.lanes.peer_keys import PeerKeys
from dualpath_sgl.limits.read_limit import read_limit
from dualpath_sgl.relay.client.claims import Pointers
from dualpath_sgl.relay.client.loader import Loader
from dualpath_sgl.relay.client.memory.destinations import Destinations
from dualpath_sgl.relay.client.memory.transports import Transports
from dualpath_sgl.relay.client.options import options
from dualpath_sgl.relay.client.relays import Relays, told
from dualpath_sgl.relay.resident.noting import NotingStore
from dualpath_sgl.relay.resident.server import ResidentServer, Served
from dualpath_sgl.relay.resident.serving import Serving
from dualpath_sgl.relay.wire import Hello
from dualpath_sgl.spans import stages
from dualpath_sgl.start.config import settings
from dualpath_sgl.start.dp_rank import port_of_rank
from dualpath_sgl.threads.priority import wait_politely
from scheduler_svc.telemetry.tracing import init_tracing
from scheduler_svc.wire.protocol import Mode

logger = logging.getLogger(__name__)


@cache
def _transports(host: str, protocol: str, device: str, bounce_bytes: int) -> Transports:
    """Those of the process, whenever its storage is attached: a pull that hangs keeps its memory."""
    return Transports(partial(Forwarder, host, protocol, device, []), bounce_bytes)


@cache
def _serving(host: str, port: int, protocol: str, device: str, keys: PeerKeys | None) -> Serving:
    """One for the process, as its memory is."""
    return Serving(Forwarder(host, protocol, device, []), partial(ResidentServer, host, port, keys=keys))


@cache
def _peer_keys(key_file: Path, directory: Path) -> PeerKeys:
    return PeerKeys(key_file, directory)


class _Look(threading.local):
    """Whether the calling thread asks what the store has of a prompt, as it does before a load."""

    before_a_load = False


class RelayStore(NotingStore):
    calls_may_overlap = True
    """SGLang's prefetch may have several under way (`prefetch/hooks.py`)."""
    dualpath_mode: Mode | None = Mode.RELAY
    """In which it works; None while that is open."""

    def __init__(self, storage_config: HiCacheStorageConfig, pool_or_kwargs: Any = None) -> None:
        """Connect to the store.  Raises ValueError for options that are none, and whatever MooncakeStore raises."""
        bound_mooncakes_patience()
        extra_config = storage_config.extra_config or {}
        self._options = options(extra_config)
        self._read_limit = read_limit(extra_config)
        self._thread = threading.local()
        """Whether a thread that waits for the store has lowered its priority."""
        self._look = _Look()
        self.loader: Loader | None = None
        self._serving: Serving | None = None
        """Of a decode engine in mode relay."""
        # SGLang gives the host pool to backends that it knows by name, and a dictionary to `dynamic` ones.
        super().__init__(storage_config, None if isinstance(pool_or_kwargs, dict) else pool_or_kwargs)
        self._destinations = Destinations()
        self.relays = Relays(self._options.helpers) if self._options.helpers else told
        self.objects: str | None = None
        """Names what this rank's objects are called, and their sizes, for those who take or give them by key."""
        self.fetch_endpoint: str | None = None
        """Where they are given away."""

    @property
    def is_told(self) -> bool:
        """Whether who may help is what the scheduler says."""
        return self.relays is told

    def open_relays(self, are_expected: bool = True) -> None:
        """Begin to connect to them.  Raises RuntimeError when the transfer engine does not start, OSError.

        `are_expected`: else memory is taken when there is one.
        """
        chosen, own, config = self._options, settings(), self.storage_config
        tracer = init_tracing(own.engine_id or "prefill", own.otlp_endpoint) if own.otlp_endpoint else None
        if tracer is not None:
            stages.follow(tracer)
        keys = _peer_keys(own.key_file, own.peer_keys) if own.key_file and own.peer_keys else None
        transports = _transports(own.host, own.protocol, own.device, chosen.bounce_bytes)
        if are_expected:
            transports.prepare()
        self.loader = Loader(
            self._read_by_own_client,
            self.relays,
            Hello(
                engine=own.engine_id or f"{socket.gethostname()}-{os.getpid()}",
                rank=config.tp_rank,
            ),
            transports,
            self._destinations,
            chosen,
            is_shared=self._is_shared() if config.is_mla_model and config.tp_size > 1 else None,
            secure=keys.towards if keys else None,
            tracer=tracer,
        )
        logger.info(
            "DualPath: relays %s", ", ".join(helper.name for helper in self.relays.helpers) or "none yet"
        )

    def _is_shared(self) -> Callable[[str], bool]:
        """Keys of latent KV name no rank: all ranks have the same objects.  States and heads have their rank's."""
        latent = re.compile(rf"[0-9a-f]{{64}}_{re.escape(self.mla_suffix)}_")
        return lambda key: latent.search(key) is not None

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        super().register_mem_pool_host(mem_pool_host)
        self._may_be_filled(mem_pool_host)
        if self.dualpath_mode is Mode.RELAY:
            is_prefill_engine = not is_decode_engine()
            self.open_relays(are_expected=is_prefill_engine or not self.is_told)
            if is_prefill_engine and self.is_told:
                self.objects = self._name_objects()
            elif not is_prefill_engine:
                self._serve(mem_pool_host)

    def _serve(self, pool: Any) -> None:
        """Answer for what lies in it.  Raises what `Serving` raises."""
        own, config = settings(), self.storage_config
        port = port_of_rank(own.page_port, config)
        keys = _peer_keys(own.key_file, own.peer_keys) if own.key_file and own.peer_keys else None
        self._serving = _serving(own.host, port, own.protocol, own.device, keys)
        if pool.kv_buffer is None:
            return
        lives = self._serving.serve(pool, self._iter_host_pool_buffers(pool))
        if lives is not None and self._serving.server is not None:
            self.note_in(self._serving.index, lives)
            self.objects, self.fetch_endpoint = self._name_objects(), self._serving.server.endpoint

    @property
    def served(self) -> Served | None:
        """What this decode engine has given to those that ask by key; None where nobody does."""
        server = self._serving.server if self._serving is not None else None
        return server.served if server is not None else None

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        self._may_be_filled(host_pool)

    def close(self) -> None:
        if self.loader is not None:
            self.loader.close()
        self.note_no_more()
        self.objects = self.fetch_endpoint = None
        super().close()

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        with self._before_a_load():
            pages: int = super().batch_exists(keys, extra_info)
        return pages

    def batch_exists_v2(self, keys: list[str], pool_transfers: Any = None, extra_info: Any = None) -> Any:
        with self._before_a_load():
            return super().batch_exists_v2(keys, pool_transfers, extra_info)

    def _batch_exist(self, key_strs: list[str]) -> list[int]:
        """Also asked before a write, where only what the store itself has counts."""
        stored = super()._batch_exist
        if self.loader is None or not self._look.before_a_load:
            return list(stored(key_strs))
        return self.loader.exist(key_strs, stored)

    @contextmanager
    def _before_a_load(self) -> Iterator[None]:
        before, self._look.before_a_load = self._look.before_a_load, True
        try:
            yield
        finally:
            self._look.before_a_load = before

    def _may_be_filled(self, pool: Any) -> None:
        for buffer in self._iter_host_pool_buffers(pool):
            if buffer.device.type == "cpu" and buffer.numel():
                self._destinations.add(buffer.data_ptr(), buffer.numel() * buffer.element_size())

    def _get_batch_zero_copy_impl(
        self, key_strs: list[str], buffer_ptrs: list[Any], buffer_sizes: list[Any]
    ) -> list[int]:
        if self.loader is None or (self.dualpath_mode is Mode.DECODE_SIDE and not self.relays.helpers):
            return list(self._read_by_own_client(key_strs, buffer_ptrs, buffer_sizes))
        results = self.loader.load(key_strs, buffer_ptrs, buffer_sizes)
        self.note_read(key_strs, buffer_ptrs, buffer_sizes, results)
        return results

    def _read_by_own_client(
        self, keys: list[str], pointers: list[Pointers], sizes: list[Pointers]
    ) -> Sequence[int]:
        self._wait_politely()
        begun_s = time.monotonic()
        results: list[int] = MooncakeStore._get_batch_zero_copy_impl(self, keys, pointers, sizes)
        if self._read_limit is not None:
            self._read_limit.pace(sum(result for result in results if result > 0), begun_s)
        return results

    def _wait_politely(self) -> None:
        """SGLang's I/O thread waits for the store, and Mooncake waits by asking: on few cores it would take one from
        the lanes and from the scheduler loop."""
        if threading.current_thread() is not threading.main_thread() and not vars(self._thread):
            self._thread.is_polite = True
            wait_politely()


def is_decode_engine() -> bool:
    from sglang.srt.runtime_context import get_disagg

    try:
        return bool(get_disagg().disaggregation_mode == "decode")
    except ValueError:  # a backend alone, with no engine around it
        return False
