import hashlib
import json
from pathlib import Path

from dualpath_sgl.launch.setup.tiny_model import TinyModel, build

SMALL = TinyModel(layers=1, hidden=16, heads=2, kv_heads=1, head_dim=8, context_length=256)


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def test_the_same_parameters_give_the_same_bytes(tmp_path):
    assert digests(build(SMALL, tmp_path / "a")) == digests(build(SMALL, tmp_path / "b"))


def test_another_seed_changes_the_weights_and_nothing_else(tmp_path):
    first = digests(build(SMALL, tmp_path))
    second = digests(build(SMALL.model_copy(update={"seed": 8}), tmp_path))
    assert {name for name in first if first[name] != second[name]} == {"model.safetensors"}


def test_a_built_model_is_reused(tmp_path):
    directory = build(SMALL, tmp_path)
    stamp = (directory / "model.safetensors").stat().st_mtime_ns
    assert build(SMALL, tmp_path) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == stamp


def test_an_mla_model_keeps_one_vector_per_token_and_layer(tmp_path):
    from transformers import AutoConfig

    mla = SMALL.model_copy(update={"kv_lora_rank": 48})
    config = AutoConfig.from_pretrained(build(mla, tmp_path))
    assert config.architectures == ["DeepseekV2ForCausalLM"]
    assert (config.kv_lora_rank, config.qk_rope_head_dim) == (48, 16)
    assert config.first_k_dense_replace == config.num_hidden_layers, "no layer may need experts"


def test_nothing_but_the_finished_model_stays_behind(tmp_path):
    directory = build(SMALL, tmp_path)
    assert list(tmp_path.iterdir()) == [directory]


def test_transformers_reads_the_model_and_the_tokenizer_is_lossless(tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    directory = build(SMALL, tmp_path)
    assert AutoConfig.from_pretrained(directory).num_key_value_heads == 1
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = "naïve <tags> and\n\ttabs"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert max(tokenizer.encode(text)) < json.loads((directory / "config.json").read_text())["vocab_size"]
