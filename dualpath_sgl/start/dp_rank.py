"""Which data parallel rank of its server this process belongs to.

With DP attention SGLang tells a storage backend its rank within the attention group only: every DP
rank says rank 0 of 1 (or of what tensor parallelism is left).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig


def dp_place() -> tuple[int | None, int]:
    """DP rank and number of DP ranks; `(None, 1)` without data parallelism."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    if parallel.attn_dp_size > 1:
        return parallel.attn_dp_rank, parallel.attn_dp_size
    if parallel.dp_size > 1:  # replicas, each with a tensor parallel group of its own
        return parallel.dp_rank, parallel.dp_size
    return None, 1


def port_of_rank(first: int, config: HiCacheStorageConfig) -> int:
    """Where this rank listens when rank 0 of its server does at `first`; 0, a free port, is so for all."""
    return first and first + config.dp_rank * config.tp_size + config.tp_rank
