"""What the bytes of a page are: how two engines, and an engine and the store, know that they mean the same.

SGLang's names for them say less than their bytes do.  Pools of one size hold a page's numbers in
different orders, as numbers of different types, of different layers; all of it goes into a digest.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

GEOMETRY = (
    "layout",
    "page_size",
    "size_per_token",
    "layer_num",
    "target_layer_num",
    "start_layer",
    "end_layer",
    "head_num",
    "head_dim",
    "v_head_dim",
    "head_group_num",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "kv_cache_dim",
    "dcp_size",
)
"""Attributes of SGLang's host pools that decide which byte of a page is what; each kind has some of them."""
STATES = ("num_mamba_layers", "temporal_state_shape", "conv_state_shapes")
"""The same of a pool of states."""


def page_blocks(pool: Any, host_indices: Any) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """Addresses of the blocks of each page in `host_indices` and the bytes of each block.

    `host_indices`: int64 tensor of whole pages, `n * page_size` token slots.  A page has one
    block (MLA) or two (K and V) with the `page_first_direct` layout.  Raises ValueError when the
    pool does not give every page the same blocks.
    """
    pointers, sizes = pool.get_page_buffer_meta(host_indices)
    pages = len(host_indices) // pool.page_size
    blocks = len(pointers) // pages if pages else 0
    if not blocks or blocks * pages != len(pointers) or list(sizes) != list(sizes[:blocks]) * pages:
        raise ValueError(
            f"{type(pool).__name__}: {len(pointers)} blocks of {sorted(set(sizes))} bytes for {pages} pages "
            f"of {pool.page_size} tokens: no page of it can be moved by itself"
        )
    return (
        [tuple(pointers[page * blocks : (page + 1) * blocks]) for page in range(pages)],
        tuple(sizes[:blocks]),
    )


def page_bytes(pool: Any) -> int:
    """Bytes of one page on this rank, all layers.  Raises what `page_blocks` raises."""
    _, sizes = page_blocks(pool, torch.arange(pool.page_size))
    return sum(sizes)


def geometry(pool: Any) -> dict[str, Any]:
    """Which byte of a page is what."""
    facts = {name: getattr(pool, name, None) for name in GEOMETRY}
    facts |= {name: getattr(pool, name) for name in STATES if hasattr(pool, name)}
    if hasattr(pool, "temporal_dtype"):  # its `dtype` is that of the convolution's states only
        facts["temporal_dtype"] = short_dtype(pool.temporal_dtype)
    return facts | {"pool": type(pool).__name__, "stored_as": short_dtype(getattr(pool, "dtype", None))}


def fingerprint(pool: Any, model_name: str | None, tp_size: int, **more: Any) -> str:
    """A short name that differs whenever pages of two ranks could not be exchanged.

    `more`: what else must be equal, JSON values.
    """
    facts = geometry(pool) | {"model": model_name, "tp_size": tp_size} | more
    return f"{pool.layout}/{short_dtype(pool.dtype)}/p{pool.page_size}/{digest(facts)}"


def short_dtype(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def digest(facts: Any) -> str:
    """16 hexadecimal digits; `facts` is a JSON value."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
