"""What must be true of an engine without work: nothing is held, every page can be given back.

`held` counts what DualPath itself still holds; the heartbeat carries it, and it is 0 whenever the
engine is idle.  `PoolCheck` asks the pools: when SGLang, idle, is about to drop its whole cache
(`/flush_cache`), everything in it is evicted first by SGLang's own rules.  A page that stays was
pinned, or taken out of the pool and forgotten.  (Dropping the cache marks every page free,
whoever held it, so afterwards there is nothing to see.)
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from dualpath_sgl.threads import faults

if TYPE_CHECKING:
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

logger = logging.getLogger(__name__)

SETTLE_ROUNDS, SETTLE_S = 3, 0.01
"""What has just ended hands its pages back over two of SGLang's queues, an iteration each.  A number, not a
condition: every rank must call SGLang's collectives alike."""


class PoolCheck:
    """Runs on SGLang's scheduler thread; any thread may read the counts."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self.checks = 0
        """Flushes at which the pools could be judged."""
        self.kept_pages = 0
        """Host and device pages that those flushes found nobody able to give back; must stay 0."""

    def before_flush(self, tree: UnifiedRadixCache) -> None:
        """Empty the cache by eviction, and count what is left.

        Copies and backups that SGLang still runs hold pages rightly: such a flush is not judged.
        """
        try:
            for _ in range(SETTLE_ROUNDS):
                tree.check_hicache_events()
                time.sleep(SETTLE_S)
            if _under_way(tree):
                return
            kept = unevictable_pages(tree, self._pool)
        except Exception:
            # Whatever this finds, the operator who asked for a flush gets one.
            faults.record("the pools could not be checked before the flush")
            return
        self.checks += 1
        if any(kept):
            self.kept_pages += sum(kept)
            logger.error(
                "DualPath: idle, but %d host pages and %d device pages cannot be evicted: they were "
                "pinned or taken and never given back",
                *kept,
            )


def unevictable_pages(tree: UnifiedRadixCache, pool: Any) -> tuple[int, int]:
    """Evict all that may be evicted; host and device pages that are still taken after it."""
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    device = tree.token_to_kv_pool_allocator
    tree.evict(EvictParams(num_tokens=device.size))
    tree.evict_host(pool.logical_size)
    host_tokens = pool.logical_size - pool.available_size()
    device_tokens = device.size - device.available_size()
    return host_tokens // pool.page_size, device_tokens // pool.page_size


def _under_way(tree: UnifiedRadixCache) -> bool:
    return bool(
        tree.ongoing_write_through or tree.ongoing_load_back or tree.ongoing_backup or tree.ongoing_prefetch
    )
