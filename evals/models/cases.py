"""What one proof starts: a model, and the engines that serve it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dualpath_sgl.evals.models.checkpoint import Architecture, build
from dualpath_sgl.evals.models.drafts import Draft, build_draft
from dualpath_sgl.launch.config.cluster import ClusterConfig, Mode
from dualpath_sgl.launch.setup.tiny_model import TinyModel
from dualpath_sgl.launch.setup.tiny_model import build as build_tiny


@dataclass(frozen=True)
class Case:
    name: str
    model: TinyModel | Architecture
    says: str
    """What of a model or deployment it stands for."""
    flags: tuple[str, ...] = ()
    """Of every engine and of the server that they are compared with."""
    prefill_flags: tuple[str, ...] = ()
    decode_flags: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    tp: tuple[int, int] = (1, 1)
    """Ranks of a prefill engine, of a decode engine."""
    shares_gpus: bool = False
    """Both engines take the same GPUs: a host with two can have two ranks each."""
    draft: Draft | None = None
    page_tokens: int = 16
    prompt_tokens: int = 700
    """Of a session's first turn."""
    pool_tokens: int = 8192

    @property
    def told_flags(self) -> str:
        """What makes it different, for people."""
        ranks = [f"tp {self.tp[0]}" if self.tp[0] == self.tp[1] else f"tp {self.tp[0]} and {self.tp[1]}"]
        special = [flag for flag in (*self.flags, *self.prefill_flags) if not flag.startswith(BORING)]
        return " ".join([*(ranks if self.tp != (1, 1) else []), *special])


BORING = (
    "--mem-fraction-static",
    "--attention-backend=triton",
    "--sampling-backend",
    "--cuda-graph",
    "--max-running-requests",
    "--max-mamba-cache-size",
)
"""Flags that only make a machine's memory suffice, or a start short."""


def described(
    case: Case,
    device: str,
    mode: Mode,
    more_flags: tuple[str, ...] = (),
    more_env: dict[str, str] | None = None,
) -> ClusterConfig:
    """One engine of each role; builds the models."""
    model = build_tiny(case.model) if isinstance(case.model, TinyModel) else build(case.model)
    flags = [*case.flags, *more_flags]
    if case.draft is not None:
        flags.append(f"--speculative-draft-model-path={build_draft(case.draft)}")
    env = case.env | (more_env or {})
    shared = ["--base-gpu-id=0"] if device == "cuda" and case.shares_gpus else []

    def group(tp: int, own: tuple[str, ...]) -> dict[str, Any]:
        return {
            "tp_size": tp,
            "max_total_tokens": case.pool_tokens,
            "host_pool": {"ratio": 2},
            "extra_args": [*flags, *own, *shared],
            "env": env,
        }

    return ClusterConfig.model_validate(
        {
            "name": case.name,
            "device": device,
            "mode": mode,
            "model": {"kind": "directory", "path": str(model)},
            "page_size": case.page_tokens,
            # Slow enough that relays are still needed when they have been asked.
            "store": {"segment_bytes": 2**30, "read_rate": "400mbit"},
            "prefill": group(case.tp[0], case.prefill_flags),
            "decode": group(case.tp[1], case.decode_flags),
            "tracing": {"enabled": False},
        }
    )


def single(case: Case, cluster: ClusterConfig) -> ClusterConfig:
    """The server to compare with: without what is only the prefill engine's, on CPUs with one rank."""
    own = [arg for arg in cluster.prefill.extra_args if arg not in case.prefill_flags]
    ranks = case.tp[0] if cluster.device == "cuda" else 1
    group = cluster.prefill.model_copy(update={"extra_args": tuple(own), "tp_size": ranks})
    return cluster.model_copy(update={"prefill": group})
