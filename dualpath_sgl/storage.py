"""The HiCache storage backend of an engine under DualPath, in either mode.

The plugin puts it in the place of SGLang's own under the name `mooncake`; `dynamic` may name it, too.  Keys,
layout and every read and write are SGLang's own `MooncakeStore`.  In mode relay what it reads may come through
relays (`RelayStore`).  With decode-side loads this class adds the life of the engine's DualPath runtime, which
needs the host pool that is registered here.
"""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import Any

from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, PoolName

from dualpath_sgl import runtime
from dualpath_sgl.hooks import assert_applied
from dualpath_sgl.pools import weights
from dualpath_sgl.relay.client.store import RelayStore, is_decode_engine
from dualpath_sgl.start import facts
from dualpath_sgl.start.checks import Facts
from dualpath_sgl.start.config import settings
from dualpath_sgl.start.verdict import Refused, require
from scheduler_svc.wire.protocol import Mode

logger = logging.getLogger(__name__)


class DualPathStorage(RelayStore):
    def __init__(self, storage_config: HiCacheStorageConfig, pool_or_kwargs: Any = None) -> None:
        """Connect to the store.

        Raises RuntimeError when DualPath is off or its hooks did not apply, start.verdict.Refused
        when it cannot serve this rank, and whatever RelayStore raises.
        """
        if not settings().enabled:
            raise RuntimeError(
                "storage backend 'dualpath' needs DUALPATH_ENABLED=1; without it use "
                "--hicache-storage-backend mooncake"
            )
        assert_applied()
        # SGLang gives a dictionary to `dynamic` backends only.
        self._facts = facts.of_backend(storage_config, is_named=not isinstance(pool_or_kwargs, dict))
        require(facts.judged(self._facts))
        self.dualpath_mode = None
        super().__init__(storage_config, pool_or_kwargs)

    def _tag_keys(self, keys: list[str]) -> list[str]:
        """Every key that is read, written or asked for comes through here, on any of SGLang's threads."""
        name = weights.current().name
        return super()._tag_keys([f"{name}_{key}" for key in keys] if name else keys)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Raises Refused for a pool that is added to several ranks which load decode-side already."""
        several = self.storage_config.tp_size > 1
        if host_pool_name != PoolName.KV and several and self.dualpath_mode is Mode.DECODE_SIDE:
            raise Refused(
                f"the model has a host pool {host_pool_name} beside its KV, which decode-side loads serve on one "
                "rank only; export DUALPATH_MODE=relay"
            )
        super().register_mem_host_pool_v2(host_pool, host_pool_name)

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Now everything is known that decides about the mode."""
        found = facts.judged(_both(self._facts, facts.of_pool(mem_pool_host)))
        mode = require(found)
        if mode is Mode.RELAY and runtime.current() is not None:
            raise Refused(
                f"this engine has loaded decode-side since its start, and cannot now: {found.because}"
            )
        self.dualpath_mode = mode
        logger.info("DualPath: mode %s: %s", mode, found.because)
        super().register_mem_pool_host(mem_pool_host)
        if mode is Mode.DECODE_SIDE:
            self.calls_may_overlap = False  # lanes of the runtime read, not SGLang's thread
            if not self.is_told or not is_decode_engine():
                # In what a prefill engine reads itself they take part.
                self.open_relays(are_expected=not self.is_told)
            engine = runtime.start(settings(), self.storage_config, mem_pool_host, self.is_told)
            engine.loader = self.loader


def _both(some: Facts, others: Facts) -> Facts:
    """What either of them knows."""
    known = {
        field.name: value
        for each in (some, others)
        for field in fields(each)
        if (value := getattr(each, field.name)) != field.default
    }
    return Facts(**known)
