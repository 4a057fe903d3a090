"""Before a flush every page must be evictable; one that is not was pinned or lost.

The host pool is SGLang's.  A stand-in tree evicts what the test says is in it: in a sound engine
nothing is ever unevictable, so the end-to-end tests, which run this on SGLang's own tree, can only
see the check pass.
"""

from __future__ import annotations

from types import SimpleNamespace

from data_path_world import PAGE_TOKENS, host_pool

from dualpath_sgl.pools.integrity import PoolCheck

DEVICE_TOKENS = 4 * PAGE_TOKENS


class Tree:
    """`cached` host slots can be evicted, unless a lock pins them; the device pool is empty."""

    def __init__(self, pool, cached) -> None:
        self._pool = pool
        self._cached = cached
        self.pinned = False
        self.token_to_kv_pool_allocator = SimpleNamespace(
            size=DEVICE_TOKENS, available_size=lambda: DEVICE_TOKENS - self.device_taken_tokens
        )
        self.device_taken_tokens = 0
        self.ongoing_write_through: dict = {}
        self.ongoing_load_back: dict = {}
        self.ongoing_backup: dict = {}
        self.ongoing_prefetch: dict = {}

    def check_hicache_events(self) -> None: ...

    def evict(self, _params) -> None: ...

    def evict_host(self, tokens: int) -> None:
        assert tokens >= len(self._cached)
        if not self.pinned:
            self._pool.free(self._cached)


def test_a_cache_that_can_be_evicted_leaves_nothing():
    pool = host_pool(4)
    check = PoolCheck(pool)
    check.before_flush(Tree(pool, pool.alloc(3 * PAGE_TOKENS)))
    assert (check.checks, check.kept_pages) == (1, 0)


def test_pinned_pages_are_counted_and_logged(caplog):
    pool = host_pool(4)
    check = PoolCheck(pool)
    tree = Tree(pool, pool.alloc(3 * PAGE_TOKENS))
    tree.pinned = True
    check.before_flush(tree)
    assert (check.checks, check.kept_pages) == (1, 3)
    assert "3 host pages and 0 device pages" in caplog.text


def test_pages_that_belong_to_nobody_are_counted():
    pool = host_pool(4)
    check = PoolCheck(pool)
    tree = Tree(pool, pool.alloc(PAGE_TOKENS))
    pool.alloc(2 * PAGE_TOKENS)
    tree.device_taken_tokens = PAGE_TOKENS
    check.before_flush(tree)
    assert (check.checks, check.kept_pages) == (1, 3)


def test_a_flush_during_a_backup_is_not_judged():
    pool = host_pool(4)
    check = PoolCheck(pool)
    tree = Tree(pool, pool.alloc(3 * PAGE_TOKENS))
    tree.pinned, tree.ongoing_backup = True, {1: "to the store"}
    check.before_flush(tree)
    assert (check.checks, check.kept_pages) == (0, 0)
