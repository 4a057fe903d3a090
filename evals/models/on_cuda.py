"""The proofs on GPUs: the real structure and head sizes of models that are served, a few layers of them."""

from __future__ import annotations

from typing import Any

from dualpath_sgl.evals.models.cases import Case
from dualpath_sgl.evals.models.checkpoint import Architecture
from dualpath_sgl.evals.models.drafts import Draft

CONTEXT_LENGTH = 32768
ENGINE = (
    # Three engines on one GPU.
    "--mem-fraction-static=0.25",
    "--attention-backend=triton",
    "--sampling-backend=pytorch",
    "--max-running-requests=16",
)
NO_GRAPHS = ("--cuda-graph-backend-decode=disabled", "--cuda-graph-backend-prefill=disabled")
EQUAL_WORK = ("--enable-deterministic-inference",)
"""Gives equal tokens, whatever shares its batch; without it near ties of a random model may flip."""
USUAL = (*ENGINE, *NO_GRAPHS, *EQUAL_WORK)


def _architecture(model_type: str, next_token_layer: bool = False, **config: Any) -> Architecture:
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": CONTEXT_LENGTH,
        "rms_norm_eps": 1e-6,
    }
    return Architecture(
        model_type=model_type, config={**sizes, **config}, dtype="bfloat16", next_token_layer=next_token_layer
    )


_LATENT: dict[str, Any] = {
    "num_hidden_layers": 4,
    "num_key_value_heads": 16,
    "head_dim": 64,
    "q_lora_rank": 512,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "moe_intermediate_size": 512,
}
_INDEXER: dict[str, Any] = {
    # Kernels of sparse attention want as many heads as the real model has.
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
}
GQA = _architecture("qwen3")
MLA = _architecture("deepseek_v3", **_LATENT)
MTP = _architecture("deepseek_v3", next_token_layer=True, **_LATENT)
DSA = _architecture("deepseek_v32", **{**_LATENT, **_INDEXER})
SWA = _architecture(
    "laguna",
    layer_types=["sliding_attention", "full_attention"] * 4,
    sliding_window=256,
    mlp_layer_types=["dense"] * 8,
)
GDN = _architecture(
    "qwen3_next",
    num_key_value_heads=2,
    head_dim=256,
    full_attention_interval=4,
    linear_num_key_heads=8,
    linear_num_value_heads=16,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=512,
    shared_expert_intermediate_size=512,
)
EAGLE3 = Draft(hidden=1024, heads=16, kv_heads=8, head_dim=128, context_length=CONTEXT_LENGTH)
DP_ATTENTION = ("--dp-size=2", "--enable-dp-attention")
SPECULATIVE = (
    "--speculative-num-steps=2",
    "--speculative-eagle-topk=1",
    "--speculative-num-draft-tokens=3",
)
DSA_FLAGS = (
    # What runs without DeepGEMM and FlashMLA.
    "--dsa-topk-backend=torch",
    "--dsa-prefill-backend=triton",
    "--dsa-decode-backend=triton",
    "--kv-cache-dtype=bfloat16",
)
DSA_ENV = {"SGLANG_FP8_PAGED_MQA_LOGITS_TORCH": "1", "SGLANG_DSA_FUSE_TOPK": "false"}


def _case(name: str, model: Architecture, says: str, flags: tuple[str, ...] = USUAL, **more: Any) -> Case:
    sizes = {"page_tokens": 64, "prompt_tokens": 3000, "pool_tokens": 65536}
    return Case(name, model, says, flags=flags, **{**sizes, **more})


CASES = (
    _case("gqa", GQA, "GQA: Qwen3, Llama, GLM-4, MiniMax-M2"),
    _case("gqa-graphs", GQA, "CUDA graphs", (*ENGINE, *EQUAL_WORK)),
    _case("gqa-fp8", GQA, "KV in fp8", (*USUAL, "--kv-cache-dtype=fp8_e4m3")),
    _case("gqa-tp2", GQA, "two ranks an engine", tp=(2, 2), shares_gpus=True),
    _case("gqa-tp2-1", GQA, "unequal ranks", tp=(2, 1), shares_gpus=True),
    _case(
        "mla-dp2",
        MLA,
        "DP attention on both sides",
        tp=(2, 2),
        shares_gpus=True,
        prefill_flags=DP_ATTENTION,
        decode_flags=DP_ATTENTION,
    ),
    _case(
        "gqa-page-first",
        GQA,
        "SGLang's own choice of page layout and I/O",
        prefill_flags=("--hicache-mem-layout=page_first", "--hicache-io-backend=kernel"),
    ),
    _case("mla", MLA, "MLA: DeepSeek-V3, Kimi-K2"),
    _case("mla-tp2", MLA, "ranks that share their KV", tp=(2, 2), shares_gpus=True),
    _case(
        "gdn",
        GDN,
        "gated linear attention beside full attention: Qwen3-Next, Qwen3.5",
        (*USUAL, "--max-mamba-cache-size=64"),
    ),
    _case("swa", SWA, "sliding windows beside full attention: Laguna, Gemma, gpt-oss"),
    _case(
        "dsa",
        DSA,
        "sparse attention with an indexer: DeepSeek-V3.2, GLM-5",
        (*(flag for flag in (*ENGINE, *NO_GRAPHS) if "--attention-backend" not in flag), *DSA_FLAGS),
        env=DSA_ENV,
    ),
    _case("mtp", MTP, "MTP: DeepSeek-V3, GLM-5", (*USUAL, "--speculative-algorithm=EAGLE", *SPECULATIVE)),
    _case(
        "eagle3",
        GQA,
        "EAGLE-3: a draft model with KV of its own",
        (*USUAL, "--speculative-algorithm=EAGLE3", *SPECULATIVE),
        draft=EAGLE3,
    ),
)
