"""What an engine's keys in the store begin with: a name of the bytes behind them.

SGLang's Mooncake keys are `[tag_]model_hash_rank_k`: engines of one model with another layout, dtype,
page or tensor parallel size write other bytes under the same keys.  The tag, SGLang's
`extra_backend_tag`, tells them apart, so that a page which was stored by an engine of another
kind is not found.  Prefill and decode engines of the same kind compute the same tag.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualpath_sgl.pools.layout import digest, geometry, short_dtype

if TYPE_CHECKING:
    from sglang.srt.managers.cache_controller import HiCacheController
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig

TAG = "extra_backend_tag"
BESIDE_KV = "dualpath_beside_kv"
"""In the same configuration: SGLang's names of the host pools beside that of the KV."""


def after_generate_storage_config(
    config: HiCacheStorageConfig, controller: HiCacheController, *_args: Any, **_kwargs: Any
) -> HiCacheStorageConfig:
    """Hook: an operator's own tag stays in front."""
    extra = config.extra_config or {}
    anchor = controller.storage_host_pool
    entries = getattr(controller.mem_pool_host, "entries", ())
    beside = {_name(entry): entry.host_pool for entry in entries if entry.host_pool is not anchor}
    tags = [extra.get(TAG), key_tag(anchor, controller.mem_pool_device, config, beside)]
    tag = "-".join(str(tag) for tag in tags if tag is not None)
    return replace(config, extra_config=extra | {TAG: tag, BESIDE_KV: list(beside)})


def key_tag(
    pool: Any, device_pool: Any, config: HiCacheStorageConfig, beside: Mapping[str, Any] | None = None
) -> str:
    """The tag for pages of the host pool `pool`, which mirrors `device_pool`, and of those `beside` it."""
    # A host pool says uint8 of both kinds of fp8; its device pool knows which one it is.
    dtype = short_dtype(getattr(device_pool, "dtype", getattr(pool, "dtype", None)))
    facts = geometry(pool) | {
        "dtype": dtype,
        # Every rank of an MLA model holds the same bytes, whatever their number.
        "tp_size": None if config.is_mla_model else config.tp_size,
        "pp": (config.pp_rank, config.pp_size),
        "cp": (config.attn_cp_rank, config.attn_cp_size),
        "dcp": (config.dcp_rank, config.dcp_size),
        "split_heads": config.tp_lcm_size if config.should_split_heads else None,
        "model": _model_facts(),
    }
    if beside:
        facts["beside"] = {name: geometry(other) for name, other in beside.items()}
    return f"{pool.layout}-{dtype}-p{pool.page_size}-{digest(facts)}"


def _name(entry: Any) -> str:
    return str(getattr(entry.name, "value", entry.name))


def _model_facts() -> dict[str, Any]:
    """What an operator may change about the model under the same name, and what its KV then depends on."""
    from sglang.srt.runtime_context import get_model, get_spec

    model, draft = get_model(), get_spec()
    return {
        "revision": model.revision,
        "overrides": model.json_model_override_args,
        "quantization": model.quantization,
        "kv_scales": _content(model.quantization_param_path),
        # Not the algorithm: one without a draft model leaves KV as it is, and may be a decode engine's only.
        "draft": Path(draft.speculative_draft_model_path or "").name,
        "draft_dtype": draft.speculative_draft_kv_cache_dtype,
    }


def _content(path: str | None) -> str | None:
    return None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()
