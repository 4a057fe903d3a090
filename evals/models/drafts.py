"""Draft models for speculative decoding: what a random one guesses is never right, and every answer is exact."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from dualpath_sgl.launch.setup.tiny_model import VOCABULARY_SIZE, built_once, cache_directory


class Draft(BaseModel):
    """EAGLE-3: one layer, which reads what three layers of the model made of a token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    dtype: str = "bfloat16"
    seed: int = 11


def build_draft(draft: Draft, cache: Path | None = None) -> Path:
    """Its directory, made on first use."""
    key = hashlib.sha256(draft.model_dump_json().encode()).hexdigest()[:16]
    return built_once((cache or cache_directory()) / f"tiny-eagle3-{key}", partial(_write, draft=draft))


def _write(directory: Path, draft: Draft) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(draft.seed)
    dtype = getattr(torch, draft.dtype)

    def random(rows: int, columns: int):
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).to(dtype)

    hidden, query, key_value = draft.hidden, draft.heads * draft.head_dim, draft.kv_heads * draft.head_dim
    ones = torch.ones(hidden, dtype=dtype)
    save_file(
        {
            "fc.weight": random(hidden, 3 * hidden),
            "midlayer.input_layernorm.weight": ones.clone(),
            "midlayer.hidden_norm.weight": ones.clone(),
            # It reads a token's embedding beside what the model made of the token before it.
            "midlayer.self_attn.q_proj.weight": random(query, 2 * hidden),
            "midlayer.self_attn.k_proj.weight": random(key_value, 2 * hidden),
            "midlayer.self_attn.v_proj.weight": random(key_value, 2 * hidden),
            "midlayer.self_attn.o_proj.weight": random(hidden, query),
            "midlayer.post_attention_layernorm.weight": ones.clone(),
            "midlayer.mlp.gate_proj.weight": random(2 * hidden, hidden),
            "midlayer.mlp.up_proj.weight": random(2 * hidden, hidden),
            "midlayer.mlp.down_proj.weight": random(hidden, 2 * hidden),
            "norm.weight": ones.clone(),
            "lm_head.weight": random(VOCABULARY_SIZE, hidden),
        },
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 1,
        "num_attention_heads": draft.heads,
        "num_key_value_heads": draft.kv_heads,
        "head_dim": draft.head_dim,
        "vocab_size": VOCABULARY_SIZE,
        "draft_vocab_size": VOCABULARY_SIZE,
        "max_position_embeddings": draft.context_length,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": draft.dtype,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1))
