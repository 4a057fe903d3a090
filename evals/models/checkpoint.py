"""A model directory for an architecture that transformers knows, with seeded random weights.

The names in it are those of a published checkpoint, so SGLang loads it as it would load the real one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from dualpath_sgl.launch.setup.tiny_model import VOCABULARY_SIZE, built_once, cache_directory, write_tokenizer

FORMAT = 1
"""Part of the cache key: raise it when the files written below change."""


class Architecture(BaseModel):
    """The same values give the same bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_type: str
    """As transformers calls it."""
    config: Mapping[str, Any]
    """Of `config.json`; what is not there has transformers' own value."""
    dtype: str
    """Of the weights: float32, bfloat16."""
    next_token_layer: bool = False
    """One layer more, which guesses the next token but one (DeepSeek's MTP)."""
    seed: int = 7


def build(architecture: Architecture, cache: Path | None = None) -> Path:
    """Directory of the model, made on first use; safe when several processes build at once."""
    described = json.dumps([FORMAT, architecture.model_dump()], sort_keys=True)
    key = hashlib.sha256(described.encode()).hexdigest()[:16]
    directory = (cache or cache_directory()) / f"tiny-{architecture.model_type.replace('_', '-')}-{key}"
    return built_once(directory, partial(_write, architecture=architecture))


def _write(directory: Path, architecture: Architecture) -> None:
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    values = dict(architecture.config)
    context_length = values["max_position_embeddings"]
    token_ids = write_tokenizer(directory, context_length)
    values |= {
        "vocab_size": VOCABULARY_SIZE,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": token_ids["<|im_end|>"],
        "pad_token_id": None,
    }
    layers = values["num_hidden_layers"]
    values["num_hidden_layers"] = layers + architecture.next_token_layer
    torch.manual_seed(architecture.seed)
    config = CONFIG_MAPPING[architecture.model_type](**values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _draw(name, parameter)
    model.to(getattr(torch, architecture.dtype)).save_pretrained(directory)
    values["num_hidden_layers"] = layers
    if architecture.next_token_layer:
        values["num_nextn_predict_layers"] = 1
        _make_the_last_layer_guess(directory, layers)
    # What transformers writes of it in its own words, SGLang may ask for in those of published models.
    saved = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(saved | values, indent=1))


def _draw(name: str, parameter: Any) -> None:
    """Scaled so that a unit-variance input keeps unit variance, and greedy answers are varied (as in
    `launch/setup/tiny_model.py`): attention is sharp and weighs as much as the residual, logits are large.
    """
    kind = name.split(".")[-2] if name.endswith((".weight", ".bias")) else name.split(".")[-1]
    if kind in ("q_norm", "k_norm"):
        parameter += 1.0
    elif kind == "sinks":
        parameter.normal_()
    elif parameter.dim() >= 2:
        inputs = parameter[0].numel() if parameter.dim() == 3 and kind == "conv1d" else parameter.shape[-1]
        scale = {"embed_tokens": inputs**0.5, "lm_head": 4.0}.get(kind, 1.0)
        if kind in ("o_proj", "out_proj") or kind.startswith(("q_", "kv_")):
            scale = 2.0
        parameter.normal_(std=scale * inputs**-0.5)


def _make_the_last_layer_guess(directory: Path, layers: int) -> None:
    """The layer after the model's own reads the embedding of a token beside what the model made of the one
    before it.
    """
    import torch
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors"
    weights = load_file(path)
    norm = weights["model.norm.weight"]
    hidden = len(norm)
    prefix = f"model.layers.{layers}."
    joined = torch.randn(hidden, 2 * hidden) * (2 * hidden) ** -0.5
    weights |= {
        prefix + "enorm.weight": norm.clone(),
        prefix + "hnorm.weight": norm.clone(),
        prefix + "eh_proj.weight": joined.to(norm.dtype),
        prefix + "shared_head.norm.weight": norm.clone(),
    }
    save_file(weights, path, metadata={"format": "pt"})
