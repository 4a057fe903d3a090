"""Proofs of models: what they serve, and what is kept of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from dualpath_sgl.evals.models import on_cpu, on_cuda
from dualpath_sgl.evals.models.__main__ import DEVICES, main
from dualpath_sgl.evals.models.cases import described, single
from dualpath_sgl.evals.models.checkpoint import Architecture, build
from dualpath_sgl.evals.models.drafts import Draft, build_draft
from dualpath_sgl.evals.models.record import Record, keep
from dualpath_sgl.launch.config.cluster import Mode

SMALL = Architecture(
    model_type="deepseek_v3",
    config={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 2,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
        "max_position_embeddings": 1024,
    },
    dtype="float32",
    next_token_layer=True,
)
RECORD = Record("gqa", "tp 2", "cpu", "relay", 9, True, 1000, 0, 0)


def names(directory) -> set[str]:
    with safe_open(directory / "model.safetensors", "pt") as weights:
        return set(weights.keys())


def test_the_same_values_give_the_same_model(tmp_path):
    one, two = build(SMALL, tmp_path / "one"), build(SMALL, tmp_path / "two")
    digests = {hashlib.sha256((it / "model.safetensors").read_bytes()).digest() for it in (one, two)}
    assert len(digests) == 1
    assert build(SMALL, tmp_path / "one") == one
    assert build(SMALL.model_copy(update={"seed": 8}), tmp_path / "one") != one


def test_the_layer_that_guesses_stands_behind_the_models_own(tmp_path):
    directory = build(SMALL, tmp_path)
    config = json.loads((directory / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (2, 1)
    layers = {name.split(".")[2] for name in names(directory) if ".layers." in name}
    assert layers == {"0", "1", "2"}
    own = {"enorm", "hnorm", "eh_proj", "shared_head.norm"}
    assert {f"model.layers.2.{name}.weight" for name in own} <= names(directory)


def test_a_draft_reads_three_layers_of_its_model(tmp_path):
    directory = build_draft(Draft(hidden=32, heads=2, kv_heads=2, head_dim=16, context_length=128), tmp_path)
    with safe_open(directory / "model.safetensors", "pt") as weights:
        assert weights.get_slice("fc.weight").get_shape() == [32, 96]
        assert weights.get_slice("midlayer.self_attn.q_proj.weight").get_shape() == [32, 64]


def test_a_newer_record_stands_in_the_place_of_an_older_one(tmp_path):
    for record in (RECORD, replace(RECORD, device="cuda"), replace(RECORD, tokens_equal=False)):
        keep(tmp_path, record)
    kept = json.loads((tmp_path / "summary.json").read_text())
    assert [(it["device"], it["tokens_equal"]) for it in kept] == [("cuda", True), ("cpu", False)]
    assert set(kept[0]) == {
        *("model", "flags", "device", "mode", "requests", "tokens_equal"),
        *("relay_bytes", "forwarded_bytes", "fallbacks"),
    }


def test_what_is_only_the_prefill_engines_is_not_the_servers():
    case = next(case for case in on_cpu.CASES if case.name == "gqa-dp2")
    cluster = described(case, "cpu", Mode.RELAY)
    assert set(on_cpu.DP_ATTENTION) <= set(cluster.prefill.extra_args) & set(cluster.decode.extra_args)
    server = single(case, cluster)
    assert (server.prefill.extra_args, server.prefill.tp_size) == ((), 1)


@pytest.mark.parametrize("device", DEVICES)
def test_the_command_lists_its_proofs(device):
    import typer

    app = typer.Typer()
    app.command()(main)
    listed = CliRunner().invoke(app, ["--device", device, "--list"])
    assert listed.exit_code == 0
    assert [line.split()[0] for line in listed.output.splitlines()] == [it.name for it in DEVICES[device]]
    unknown = CliRunner().invoke(app, ["--device", device, "no-such-model"])
    assert unknown.exit_code == 2 and "no-such-model" in unknown.output


def test_proofs_have_names_of_their_own():
    for cases in (on_cpu.CASES, on_cuda.CASES):
        assert len({case.name for case in cases}) == len(cases)
