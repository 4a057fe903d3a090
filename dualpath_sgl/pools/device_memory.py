"""How much KV this rank's device could still take, and how large a page of it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache


def free_tokens(tree: UnifiedRadixCache) -> int:
    """Tokens for which SGLang could allocate KV now: free pages and those the tree would evict.

    As SGLang counts its own budget (disaggregation/decode.py:_allocatable_token_budgets).  Free pages
    alone would go to zero and stay there: a finished request's pages move into the tree.  Two
    counters; to be asked on SGLang's scheduler thread, which alone may touch the tree.
    """
    return tree.token_to_kv_pool_allocator.available_size() + tree.evictable_size()


def page_bytes(allocator: Any, page_size: int) -> int:
    """Of `page_size` tokens on this rank, all layers; on the average, where layers keep different amounts.

    1 where SGLang does not say.
    """
    pool_gib = getattr(allocator.get_kvcache(), "mem_usage", 0)
    return max(1, int(pool_gib * 2**30 * page_size / max(1, allocator.size)))
