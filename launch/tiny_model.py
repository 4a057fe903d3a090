"""The seeded tiny Qwen3 that lets the whole system run on a CPU.

`python -m launch.tiny_model` builds the default, which the CPU examples in `clusters/` use.

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
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY_SIZE = 512
FORMAT = 1
"""Part of the cache key: raise it when the files written below change."""
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class TinyModel(BaseModel):
    """Dimensions of the model; the same values give the same bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: int = Field(4, ge=1, le=64)
    hidden: int = Field(128, ge=8, le=4096)
    heads: int = Field(16, ge=1, le=128)
    kv_heads: int = Field(16, ge=1, le=128)
    head_dim: int = Field(64, ge=8, le=256, multiple_of=8)
    context_length: int = Field(32768, ge=128, le=1_048_576)
    """Longest prompt plus output, in tokens."""
    seed: int = Field(7, ge=0)


def cache_directory() -> Path:
    """`.cache/` of a source checkout, else the user's cache."""
    root = Path(__file__).resolve().parent.parent
    if (root / "Makefile").exists():
        return root / ".cache" / "models"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dualpath" / "models"


def build(model: TinyModel, cache: Path | None = None) -> Path:
    """Directory of the model, made on first use; safe when several processes build at once."""
    key = hashlib.sha256(json.dumps([FORMAT, model.model_dump()]).encode()).hexdigest()[:16]
    directory = (cache or cache_directory()) / f"tiny-qwen3-{key}"
    if directory.exists():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=directory.parent, prefix=".building-"))
    try:
        _write(staging, model)
        staging.rename(directory)
    except OSError:
        if not directory.exists():  # Otherwise another process was faster.
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return directory


def _write(directory: Path, model: TinyModel) -> None:
    token_ids = _write_tokenizer(directory, model)
    stop = token_ids["<|im_end|>"]
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": model.hidden,
        "intermediate_size": 2 * model.hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
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
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    _write_weights(directory, model)


def _write_tokenizer(directory: Path, model: TinyModel) -> dict[str, int]:
    """One token per byte, plus the chat markers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    token_ids = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=token_ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.context_length,
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
    query, key_value = model.heads * model.head_dim, model.kv_heads * model.head_dim
    weights = {
        "model.embed_tokens.weight": random(VOCABULARY_SIZE, hidden, scale=hidden**0.5),
        "model.norm.weight": torch.ones(hidden),
        # Large logits: the best token leads clearly, so rounding does not change it.
        "lm_head.weight": random(VOCABULARY_SIZE, hidden, scale=4.0),
    }
    for layer in range(model.layers):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": torch.ones(hidden),
            prefix + "self_attn.q_proj.weight": random(query, hidden),
            prefix + "self_attn.k_proj.weight": random(key_value, hidden),
            prefix + "self_attn.v_proj.weight": random(key_value, hidden),
            # Attention must weigh as much as the residual, or the prompt would not matter.
            prefix + "self_attn.o_proj.weight": random(hidden, query, scale=2.0),
            prefix + "self_attn.q_norm.weight": torch.full((model.head_dim,), 2.0),
            prefix + "self_attn.k_norm.weight": torch.full((model.head_dim,), 2.0),
            prefix + "post_attention_layernorm.weight": torch.ones(hidden),
            prefix + "mlp.gate_proj.weight": random(inner, hidden),
            prefix + "mlp.up_proj.weight": random(inner, hidden),
            prefix + "mlp.down_proj.weight": random(hidden, inner),
        }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    print(build(TinyModel()))
