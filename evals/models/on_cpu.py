"""The proofs that run on a CPU: float32, so that equal work gives equal tokens whatever shares its batch."""

from __future__ import annotations

from typing import Any

from dualpath_sgl.evals.models.cases import Case
from dualpath_sgl.evals.models.checkpoint import Architecture
from dualpath_sgl.launch.setup.tiny_model import TinyModel

GQA = TinyModel(layers=4, hidden=128, heads=8, kv_heads=4, head_dim=64)
MLA = TinyModel(layers=4, hidden=128, heads=4, kv_heads=4, head_dim=32, kv_lora_rank=240)
DP_ATTENTION = ("--dp-size=2", "--enable-dp-attention")
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
}


def _architecture(model_type: str, **more: Any) -> Architecture:
    return Architecture(model_type=model_type, config={**SIZES, **more}, dtype="float32")


# A window's KV is 2 MiB: a smaller load would ask no relay.
SWA = _architecture(
    "laguna",
    layer_types=["sliding_attention", "full_attention"] * 2,
    sliding_window=256,
    mlp_layer_types=["dense"] * 4,
)
# States of a prompt, 1.1 MiB, for the same reason.
GDN = _architecture(
    "qwen3_next",
    num_hidden_layers=6,
    full_attention_interval=3,
    linear_num_value_heads=16,
    linear_num_key_heads=8,
    linear_key_head_dim=64,
    linear_value_head_dim=64,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    shared_expert_intermediate_size=64,
)

CASES = (
    Case("gqa", GQA, "GQA: Qwen3, Llama, GLM-4, MiniMax-M2"),
    Case("mla", MLA, "MLA: DeepSeek-V3, Kimi-K2"),
    Case("gqa-tp2", GQA, "two ranks an engine", tp=(2, 2)),
    Case("mla-tp2", MLA, "ranks that share their KV", tp=(2, 2)),
    Case("gqa-tp2-1", GQA, "a prefill engine with more ranks than its decode engine", tp=(2, 1)),
    Case(
        "gqa-dp2",
        GQA,
        "DP attention on both sides",
        tp=(2, 2),
        prefill_flags=DP_ATTENTION,
        # A decode engine's default with DP attention needs an operation that is there on GPUs only.
        decode_flags=(*DP_ATTENTION, "--no-enable-tp-lm-head-all-to-all"),
    ),
    Case("swa", SWA, "sliding windows beside full attention: Laguna, Gemma, gpt-oss"),
    Case(
        "gdn",
        GDN,
        "gated linear attention beside full attention: Qwen3-Next, Qwen3.5",
        flags=("--max-mamba-cache-size=64", "--max-running-requests=8"),
        env={"SGLANG_MAMBA_CONV_DTYPE": "float32"},
    ),
    Case(
        "side-pool",
        GQA,
        "a pool whose pages follow those of the KV: DSA's indexer, draft models",
        env={"SGLANG_EXTERNAL_MODEL_PACKAGE": "dualpath_sgl.evals.models.outside"},
    ),
)
