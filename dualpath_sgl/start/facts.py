"""What SGLang knows of an engine, as the facts that checks.py judges, and when it is judged.

Three moments, each in time to end the engine with a sentence: its flags are resolved (in the server's
process, before a model is loaded), its storage backend and its host pools are made (in each rank's), and
its scheduler stands.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import getproxies_environment

from dualpath_sgl.pools.key_tag import BESIDE_KV
from dualpath_sgl.start.checks import BACKEND_CLASS, NAMED_BACKEND, NO_BACKEND, Facts
from dualpath_sgl.start.config import EVERY_ADDRESS, settings
from dualpath_sgl.start.verdict import Verdict, require, verdict

if TYPE_CHECKING:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig

logger = logging.getLogger(__name__)

INFINIBAND = Path("/sys/class/infiniband")
DRAFT = "draft"
POOLS = {
    "swa": "sliding windows",
    "mamba": "states",
    "indexer": "an indexer",
    DRAFT: "a draft model's KV",
}
"""SGLang's names of host pools -> words."""
EARLY_STEP, LATE_STEP = "handle_pd_disaggregation", "handle_other_validations"
"""Steps of SGLang's resolution: the one before it judges PD and HiCache itself, and its last judgements."""


# -- of flags ------------------------------------------------------------------------------------------


def of_choices(cfg: Any) -> Facts:
    """Facts that SGLang's resolution leaves as they are; `cfg` is a view of its flags."""
    return Facts(**_choices(cfg))


def of_flags(cfg: Any) -> Facts:
    """All facts of resolved flags and of this process's environment.  Raises what settings() raises."""
    return Facts(
        **_choices(cfg),
        layout=cfg.hicache_mem_layout,
        io_backend=cfg.hicache_io_backend,
        unified_memory=cfg.enable_unified_memory,
        host_memory_mode=cfg.hicache_host_memory_mode,
        write_policy=cfg.hicache_write_policy,
        page_size=cfg.page_size,
        tp_size=cfg.tp_size,
        beside_kv=_beside_kv(cfg),
        transfer=_transfer(cfg),
        patched=_is_patched(),
        **_of_environment(),
        own_host="127.0.0.1" if (cfg.host or "") in EVERY_ADDRESS else cfg.host,
        traced=cfg.enable_trace,
        otlp_endpoint=cfg.otlp_traces_endpoint,
    )


def _choices(cfg: Any) -> dict[str, Any]:
    return {
        "role": cfg.disaggregation_mode,
        "role_switch": cfg.enable_pd_role_switch,
        "hierarchical_cache": cfg.enable_hierarchical_cache,
        "radix_cache_backend": cfg.radix_cache_backend,
        "decode_radix_cache": cfg.disaggregation_decode_enable_radix_cache,
        "decode_offload": cfg.disaggregation_decode_enable_offload_kvcache,
        "pp_size": cfg.pp_size,
        "attn_cp_size": cfg.attn_cp_size,
        "dcp_size": cfg.dcp_size,
        **_of_backend_flags(cfg.hicache_storage_backend, cfg.hicache_storage_backend_extra_config),
    }


def _of_backend_flags(backend: str | None, extra_config: str | None) -> dict[str, Any]:
    if backend != "dynamic":
        return {"backend": backend or NO_BACKEND}
    try:
        extra = _read_extra_config(extra_config)
    except Exception as error:  # Whatever a file of any format may bring.
        return {"extra_config_error": f"{type(error).__name__}: {error}"}
    missing = [name for name in ("module_path", "class_name") if name not in extra]
    if missing:
        return {"extra_config_error": f"{' and '.join(missing)} missing"}
    return {
        "backend": f"{extra['module_path']}.{extra['class_name']}",
        "zero_copy": bool(extra.get("interface_v1", 0)),
    }


def _read_extra_config(text: str | None) -> dict[str, Any]:
    if text and text.startswith("@"):
        from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController

        extra = HybridCacheController.parse_storage_backend_extra_config(text)[0]
    else:
        extra = json.loads(text or "{}")
    if not isinstance(extra, dict):
        raise TypeError(f"it is a {type(extra).__name__}")
    return extra


def _of_environment() -> dict[str, Any]:
    own, proxies = settings(), getproxies_environment()
    return {
        "enabled": own.enabled,
        "protocol": own.protocol,
        "devices": tuple(device.strip() for device in own.device.split(",") if device.strip()),
        "host_devices": frozenset(os.listdir(INFINIBAND)) if INFINIBAND.is_dir() else frozenset(),
        "force_tcp": bool(os.environ.get("MC_FORCE_TCP")),
        "store_protocol": os.environ.get("MOONCAKE_PROTOCOL"),
        "http_proxy": proxies.get("http") or proxies.get("all"),
        "no_proxy": proxies.get("no", ""),
        "otlp_protocol": os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"),
        "otel_sdk_disabled": os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true",
        "otel_sampler": os.environ.get("OTEL_TRACES_SAMPLER"),
    }


def _beside_kv(cfg: Any) -> str | None:
    """What the model's cache holds beside KV, in words, as far as SGLang's configuration of it says."""
    from sglang.srt.arg_groups.overrides import model_config_of
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.configs.model_config import is_deepseek_dsa

    model = model_config_of(cfg)
    held = {
        "swa": model.is_hybrid_swa,
        "mamba": mambaish_config(model) is not None,
        "indexer": is_deepseek_dsa(model.hf_text_config),
        DRAFT: _has_draft_kv(cfg.speculative_algorithm),
    }
    return _in_words(held)


def _in_words(held: dict[str, bool]) -> str | None:
    """`held`: by SGLang's names of host pools."""
    return ", ".join(POOLS.get(name, name) for name, is_held in held.items() if is_held) or None


def _has_draft_kv(algorithm: str | None) -> bool:
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    return algorithm is not None and bool(SpeculativeAlgorithm.from_string(algorithm).has_draft_kv())


def _transfer(cfg: Any) -> str | None:
    return None if cfg.disaggregation_mode == "null" else cfg.disaggregation_transfer_backend


def _is_patched() -> bool:
    """Whether this SGLang's source is; nothing of it is imported."""
    found = importlib.util.find_spec("sglang.srt.disaggregation.decode")
    return (
        found is not None and found.origin is not None and "admission_gate" in Path(found.origin).read_text()
    )


# -- of a rank that starts, or that attaches the backend at run time -------------------------------------


def of_backend(config: HiCacheStorageConfig, is_named: bool) -> Facts:
    """Facts of a rank that builds its storage backend; `is_named`: as NAMED_BACKEND, not as a `dynamic` one."""
    from sglang.srt.runtime_context import get_disagg, get_memory, get_spec

    extra_config = config.extra_config or {}
    drafts = _published(lambda: _has_draft_kv(get_spec().speculative_algorithm))
    return Facts(
        role=_published(lambda: get_disagg().disaggregation_mode),
        role_switch=_published(lambda: get_disagg().enable_pd_role_switch),
        decode_offload=_published(lambda: get_disagg().disaggregation_decode_enable_offload_kvcache),
        transfer=_published(lambda: _transfer(get_disagg())),
        io_backend=_published(lambda: get_memory().hicache_io_backend),
        host_memory_mode=_published(lambda: get_memory().hicache_host_memory_mode),
        radix_cache_backend=_published(lambda: get_memory().radix_cache_backend),
        beside_kv=_in_words({**dict.fromkeys(extra_config.get(BESIDE_KV, ()), True), DRAFT: bool(drafts)}),
        patched=_is_patched(),
        backend=NAMED_BACKEND if is_named else BACKEND_CLASS,
        zero_copy=is_named or bool(extra_config.get("interface_v1", 0)),
        tp_size=config.tp_size,
        pp_size=config.pp_size,
        attn_cp_size=config.attn_cp_size,
        dcp_size=config.dcp_size,
    )


def of_pool(pool: Any) -> Facts:
    """Facts of a rank that registers its host pool."""
    accessor = getattr(pool, "get_hybrid_pool_buffer", None)
    buffers = accessor() if accessor is not None else [pool.kv_buffer]
    has_bytes = len(buffers) > 0 and all(buffer is not None for buffer in buffers)
    return Facts(layout=pool.layout, pool_without_bytes=None if has_bytes else type(pool).__name__)


def _published(read: Callable[[], Any]) -> Any:
    """None where SGLang has not published its flags: in tests of a backend alone."""
    try:
        return read()
    except ValueError:
        return None


# -- when they are judged --------------------------------------------------------------------------------


def judged(facts: Facts) -> Verdict:
    """As this process's settings ask for it."""
    return verdict(facts, settings().asked_mode)


def register_checks() -> None:
    """Judge flags in SGLang's own resolution of them, which then ends with verdict.Refused."""
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    register_resolution_hook(EARLY_STEP)(_before_pd)
    register_resolution_hook(LATE_STEP)(_after_validations)


def _before_pd(server_args: Any, previous: Callable[[Any], None]) -> None:
    from sglang.srt.arg_groups.overrides import resolving_view

    require(judged(of_choices(resolving_view(server_args))))
    previous(server_args)


def _after_validations(server_args: Any, previous: Callable[[Any], None]) -> None:
    from sglang.srt.arg_groups.overrides import resolving_view

    previous(server_args)
    found = judged(of_flags(resolving_view(server_args)))
    for problem in found.warnings:
        logger.warning("DualPath: %s", problem)
    logger.info("DualPath: mode %s: %s", require(found), found.because)
