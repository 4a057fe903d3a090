"""Judges one engine's flags as SGLang resolves them: `python -m dualpath_sgl.launch.checks.flag_check <sglang arguments>`.

In a process of its own, because SGLang's resolution writes into environment and logging.  Nothing is
started and no model is loaded; a machine without a GPU will do.  Prints one JSON object, `Judgement`.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dualpath_sgl.start.checks import Problem

LIMIT_S = 300.0
"""SGLang's import takes seconds; reading a model's configuration from a hub may take longer."""


@dataclass(frozen=True)
class Judgement:
    refusals: list[Problem]
    warnings: list[Problem]
    resolved: dict[str, Any]
    """What the flags come to, for the reader; empty where SGLang refuses them."""
    mode: str | None = None
    """What the engine would run in."""
    because: str = ""
    pool_bytes: int | None = None
    """Host memory of one rank's pool; None where only the device's memory would tell."""
    ranks: int = 1
    """Ranks of this engine, each with a pool of its own."""
    available_bytes: int = 0
    """Host memory that SGLang would find free."""


def judge(flags: Sequence[str], environment: Mapping[str, str]) -> Judgement:
    """What `flags` come to under `environment`.  Raises RuntimeError when SGLang cannot be asked."""
    command = [sys.executable, "-W", "ignore", "-m", "dualpath_sgl.launch.checks.flag_check", *flags]
    try:
        done = subprocess.run(
            command, env=dict(environment), capture_output=True, text=True, timeout=LIMIT_S, check=True
        )
    except (subprocess.SubprocessError, OSError) as error:
        last = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise RuntimeError(f"SGLang's flags could not be resolved: {last}") from None
    document = json.loads(done.stdout)
    refusals, warnings = ([Problem(**it) for it in document.pop(kind)] for kind in ("refusals", "warnings"))
    return Judgement(refusals, warnings, **document)


def _judge(flags: list[str]) -> Judgement:
    from sglang.srt.arg_groups.overrides import resolved_view
    from sglang.srt.server_args import prepare_server_args

    from dualpath_sgl.start.facts import judged, of_choices, of_flags

    usage = io.StringIO()
    try:
        with contextlib.redirect_stderr(usage):
            args = prepare_server_args(flags)
    except SystemExit:
        return _refused_by_sglang([], usage.getvalue().strip().splitlines()[-1].partition("error: ")[2])
    try:
        early = [*judged(of_choices(args)).refusals]
    except ValueError as error:
        early = [Problem("the engine's environment", "not right", str(error), "correct it")]
    elsewhere = _device_elsewhere(args)
    if elsewhere is not None:
        args = prepare_server_args([*flags, "--device=cuda"])
    try:
        args.resolve_once()
    except Exception as error:  # Its checks raise whatever they like.
        return _refused_by_sglang(early, f"{error}".strip().splitlines()[0] if str(error) else repr(error))
    cfg = resolved_view(args)
    try:
        found = judged(of_flags(cfg))
    except ValueError:
        return Judgement(early, [], _summary(cfg))
    return Judgement(
        [*found.refusals],
        [*found.warnings, *([elsewhere] if elsewhere is not None else [])],
        _summary(cfg),
        found.mode,
        found.because,
        _pool_bytes(args, cfg),
        cfg.tp_size * cfg.dp_size // cfg.nnodes,
        _available_bytes(),
    )


def _refused_by_sglang(early: list[Problem], said: str) -> Judgement:
    """A refusal of ours explains more than SGLang's answer to the same flags."""
    if early:
        return Judgement(early, [], {})
    problem = Problem("SGLang's own check of the flags", "not passed", said, "correct what it names")
    return Judgement([problem], [], {})


def _device_elsewhere(args: Any) -> Problem | None:
    """A warning where the flags are for CUDA, or name no device, and this machine has none."""
    import torch
    from sglang.srt.utils import get_device

    try:
        there = args.device or get_device()
    except RuntimeError:
        there = "cuda"
    if there != "cuda" or torch.cuda.is_available():
        return None
    return Problem(
        "--device",
        args.device or "not given",
        "this machine has no CUDA device; the flags were resolved as if it had one",
        "ask again on the engine's host: defaults may differ there",
        stops=(),
    )


def _summary(cfg: Any) -> dict[str, Any]:
    return {
        "role": cfg.disaggregation_mode,
        "page size": cfg.page_size,
        "layout": cfg.hicache_mem_layout,
        "I/O": cfg.hicache_io_backend,
        "memory mode": cfg.hicache_host_memory_mode,
        "prefetch policy": cfg.hicache_storage_prefetch_policy,
        "write policy": cfg.hicache_write_policy,
        "tp": cfg.tp_size,
        "pp": cfg.pp_size,
        "dp": cfg.dp_size,
        "attention dp": cfg.attn_dp_size,
        "attention cp": cfg.attn_cp_size,
        "dcp": cfg.dcp_size,
        "transfer": cfg.disaggregation_transfer_backend,
    }


def _pool_bytes(args: Any, cfg: Any) -> int | None:
    if cfg.hicache_size:
        return int(cfg.hicache_size * 1e9)
    if not cfg.hicache_ratio or not cfg.max_total_tokens:
        return None
    return int(cfg.max_total_tokens * cfg.hicache_ratio) * _kv_bytes_per_token(args, cfg)


def _kv_bytes_per_token(args: Any, cfg: Any) -> int:
    """Bytes of one token's KV on one rank, all layers."""
    from sglang.srt.arg_groups.overrides import model_config_of
    from sglang.srt.configs.model_config import AttentionArch

    model = model_config_of(args)
    item_bytes = 1 if "fp8" in cfg.kv_cache_dtype else model.dtype.itemsize
    if model.attention_arch == AttentionArch.MLA:
        width = model.kv_lora_rank + model.qk_rope_head_dim
    else:
        width = 2 * model.get_num_kv_heads(max(1, cfg.tp_size // cfg.attn_dp_size)) * model.head_dim
    return model.num_hidden_layers * width * item_bytes


def _available_bytes() -> int:
    from sglang.srt.mem_cache.host_memory import available_host_memory_bytes

    return available_host_memory_bytes(allow_cgroup_fallback=True)


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        judgement = _judge(sys.argv[1:])
    print(json.dumps(asdict(judgement)))
