"""The seeded tiny models that let the whole system run on a CPU: Qwen3 (GQA) or DeepSeek-V2 (MLA).

`python -m dualpath_sgl.launch.setup.tiny_model` builds the default, which the CPU examples in `clusters/` use.

Random weights of the scale below give varied greedy output, so comparing tokens compares
KV-cache content (SGLang's `--load-format dummy` repeats itself).  Many KV heads over a small
hidden size make a token's KV large against its arithmetic: storage-bound, as agents are.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY_SIZE = 512
FORMAT = 2
"""Part of the cache key: raise it when the files written below change."""
ROPE_DIM = 16
"""Rotated part of a query and of a token's KV (MLA)."""
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class TinyModel(BaseModel):
    """Dimensions of the model; the same values give the same bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    layers: int = Field(4, ge=1, le=64)
    """Layers."""
    hidden: int = Field(128, ge=8, le=4096)
    """Width between layers."""
    heads: int = Field(16, ge=1, le=128)
    """Attention heads."""
    kv_heads: int = Field(16, ge=1, le=128)
    """Heads whose keys and values are kept."""
    head_dim: int = Field(64, ge=8, le=256, multiple_of=8)
    """Width of a head."""
    kv_lora_rank: int | None = Field(None, ge=16, le=512)
    """Makes it an MLA model (DeepSeek-V2, dense): a token's KV is one vector of this width plus
    16 (`ROPE_DIM`) per layer, whatever the heads; `head_dim` is then the part of a head without rotation."""
    context_length: int = Field(32768, ge=128, le=1_048_576)
    """Longest prompt plus output, in tokens."""
    seed: int = Field(7, ge=0)
    """Draws the weights."""


def cache_directory() -> Path:
    """`.cache/` of a source checkout, else `dualpath/` in the user's cache (XDG_CACHE_HOME)."""
    root = Path(__file__).resolve().parents[2]
    if (root / "Makefile").exists():
        return root / ".cache" / "models"
    of_user = Path(os.environ.get("XDG_CACHE_HOME", ""))  # Without effect unless absolute, says XDG.
    return (of_user if of_user.is_absolute() else Path.home() / ".cache") / "dualpath" / "models"


def build(model: TinyModel, cache: Path | None = None) -> Path:
    """Directory of the model, made on first use; safe when several processes build at once."""
    key = hashlib.sha256(json.dumps([FORMAT, model.model_dump()]).encode()).hexdigest()[:16]
    architecture = "qwen3" if model.kv_lora_rank is None else "deepseek-v2"
    directory = (cache or cache_directory()) / f"tiny-{architecture}-{key}"
    return built_once(directory, partial(_write, model=model))


def built_once(directory: Path, write: Callable[[Path], None]) -> Path:
    """`directory`, which `write` fills on first use; safe when several processes build at once."""
    if directory.exists():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=directory.parent, prefix=".building-"))
    try:
        write(staging)
        staging.rename(directory)
    except OSError:
        if not directory.exists():  # Otherwise another process was faster.
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return directory


def _write(directory: Path, model: TinyModel) -> None:
    token_ids = write_tokenizer(directory, model.context_length)
    stop = token_ids["<|im_end|>"]
    config = {
        "hidden_size": model.hidden,
        "intermediate_size": 2 * model.hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "vocab_size": VOCABULARY_SIZE,
        "max_position_embeddings": model.context_length,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": stop,
        **(_gqa_config(model) if model.kv_lora_rank is None else _mla_config(model)),
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    _write_weights(directory, model)


def _gqa_config(model: TinyModel) -> dict:
    return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": model.head_dim}


def _mla_config(model: TinyModel) -> dict:
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "num_key_value_heads": model.heads,
        "kv_lora_rank": model.kv_lora_rank,
        "q_lora_rank": None,
        "qk_nope_head_dim": model.head_dim,
        "qk_rope_head_dim": ROPE_DIM,
        "v_head_dim": model.head_dim,
        # SGLang's CPU rotation of an MLA model is YaRN's only; a factor of 1 changes no position.
        "rope_scaling": {
            "type": "yarn",
            "factor": 1.0,
            "original_max_position_embeddings": model.context_length,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        # Dense: no layer reaches the experts, which SGLang's loader wants described all the same.
        "first_k_dense_replace": model.layers,
        "n_routed_experts": 1,
        "n_shared_experts": 1,
        "moe_intermediate_size": model.hidden,
        "moe_layer_freq": 1,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "topk_method": "greedy",
    }


def write_tokenizer(directory: Path, context_length: int) -> dict[str, int]:
    """One token per byte, plus the chat markers; returns every token's id."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    token_ids = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=token_ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    return tokenizer.get_vocab()


def _write_weights(directory: Path, model: TinyModel) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(model.seed)

    def random(rows: int, columns: int, scale: float = 1.0):
        """[rows, columns], scaled so that a unit-variance input keeps unit variance times `scale`."""
        return torch.randn(rows, columns, generator=generator) * scale * columns**-0.5

    hidden, inner = model.hidden, 2 * model.hidden
    weights = {
        "model.embed_tokens.weight": random(VOCABULARY_SIZE, hidden, scale=hidden**0.5),
        "model.norm.weight": torch.ones(hidden),
        # Large logits: the best token leads clearly, so rounding does not change it.
        "lm_head.weight": random(VOCABULARY_SIZE, hidden, scale=4.0),
    }
    attention = _gqa_weights if model.kv_lora_rank is None else _mla_weights
    for layer in range(model.layers):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": torch.ones(hidden),
            **{f"{prefix}self_attn.{name}.weight": w for name, w in attention(model, random).items()},
            prefix + "post_attention_layernorm.weight": torch.ones(hidden),
            prefix + "mlp.gate_proj.weight": random(inner, hidden),
            prefix + "mlp.up_proj.weight": random(inner, hidden),
            prefix + "mlp.down_proj.weight": random(hidden, inner),
        }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def _gqa_weights(model: TinyModel, random: Callable) -> dict:
    import torch

    query, key_value = model.heads * model.head_dim, model.kv_heads * model.head_dim
    return {
        "q_proj": random(query, model.hidden),
        "k_proj": random(key_value, model.hidden),
        "v_proj": random(key_value, model.hidden),
        # Attention must weigh as much as the residual, or the prompt would not matter.
        "o_proj": random(model.hidden, query, scale=2.0),
        "q_norm": torch.full((model.head_dim,), 2.0),
        "k_norm": torch.full((model.head_dim,), 2.0),
    }


def _mla_weights(model: TinyModel, random: Callable) -> dict:
    import torch

    rank, heads = model.kv_lora_rank, model.heads
    assert rank is not None, "a model with MLA"
    return {
        # No norms on query and key here: larger weights make attention as sharp as above.
        "q_proj": random(heads * (model.head_dim + ROPE_DIM), model.hidden, scale=2.0),
        "kv_a_proj_with_mqa": random(rank + ROPE_DIM, model.hidden, scale=2.0),
        "kv_a_layernorm": torch.ones(rank),
        "kv_b_proj": random(heads * 2 * model.head_dim, rank, scale=2.0),
        "o_proj": random(model.hidden, heads * model.head_dim, scale=2.0),
    }


if __name__ == "__main__":
    print(build(TinyModel()))
