"""What two engines must agree on before a page may move between their host pools."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def page_blocks(pool: Any, host_indices: Any) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """Addresses of the blocks of each page in `host_indices` and the bytes of each block.

    `host_indices`: int64 tensor of whole pages, `n * page_size` token slots.  A page has one
    block (MLA) or two (K and V) with the `page_first_direct` layout.
    """
    pointers, sizes = pool.get_page_buffer_meta(host_indices)
    pages = len(host_indices) // pool.page_size
    blocks = len(pointers) // pages
    return (
        [tuple(pointers[page * blocks : (page + 1) * blocks]) for page in range(pages)],
        tuple(sizes[:blocks]),
    )


def page_bytes(pool: Any) -> int:
    """Bytes of one page on this rank, all layers."""
    return pool.page_size * pool.size_per_token


def fingerprint(pool: Any, model_name: str | None, tp_size: int) -> str:
    """A short digest that differs whenever pages of two ranks could not be exchanged."""
    facts = {
        "model": model_name,
        "pool": type(pool).__name__,
        "layout": pool.layout,
        "dtype": str(pool.dtype),
        "layers": pool.layer_num,
        "page_size": pool.page_size,
        "bytes_per_token": pool.size_per_token,
        "tp_size": tp_size,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return f"{pool.layout}/{str(pool.dtype).removeprefix('torch.')}/p{pool.page_size}/{digest}"
