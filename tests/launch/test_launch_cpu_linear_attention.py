"""The CPU stand-ins for gated linear attention, beside what transformers computes."""

import sys

import torch
import torch.nn.functional as F
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

from dualpath_sgl.cpu_profile.install import SITE

sys.path.append(str(SITE))
from sgl_kernel import mamba

KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM, CHANNELS, WIDTH = 2, 4, 8, 6, 10, 4
STARTS = torch.tensor([0, 70, 70 + 5])
"""Of two requests' tokens in a batch, and their end."""
SLOTS = torch.tensor([3, 1])


def inputs(tokens: int, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "q": random(1, tokens, KEY_HEADS, KEY_DIM),
        "k": random(1, tokens, KEY_HEADS, KEY_DIM),
        "v": random(1, tokens, VALUE_HEADS, VALUE_DIM),
        "a": random(tokens, VALUE_HEADS),
        "b": random(tokens, VALUE_HEADS),
        "A_log": random(VALUE_HEADS),
        "dt_bias": random(VALUE_HEADS),
    }


def prompts(given: dict[str, torch.Tensor], states: torch.Tensor):
    g, beta = mamba.fused_gdn_gating_cpu(given["A_log"], given["a"], given["b"], given["dt_bias"])
    return mamba.chunk_gated_delta_rule_cpu(
        q=given["q"],
        k=given["k"],
        v=given["v"],
        g=g,
        beta=beta,
        initial_state=states,
        initial_state_indices=SLOTS,
        cu_seqlens=STARTS,
        head_first=False,
        use_qk_l2norm_in_kernel=True,
    )


def test_prompts_of_a_batch_are_what_transformers_makes_of_each():
    given, states = inputs(75), torch.randn(4, VALUE_HEADS, VALUE_DIM, KEY_DIM)
    before = states.clone()
    out, _, before_chunks = prompts(given, states)
    g = -given["A_log"].exp() * F.softplus(given["a"] + given["dt_bias"])
    for slot, start, end in ((3, 0, 70), (1, 70, 75)):
        each = VALUE_HEADS // KEY_HEADS
        expected, state = torch_recurrent_gated_delta_rule(
            given["q"][:, start:end].repeat_interleave(each, dim=2),
            given["k"][:, start:end].repeat_interleave(each, dim=2),
            given["v"][:, start:end],
            g[start:end].unsqueeze(0),
            given["b"][start:end].sigmoid().unsqueeze(0),
            initial_state=before[slot].transpose(-1, -2).unsqueeze(0),
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        torch.testing.assert_close(out[:, start:end], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(states[slot], state[0].transpose(-1, -2), atol=1e-4, rtol=1e-4)
    # Two chunks of the first prompt, one of the second one.
    assert before_chunks.shape == (1, 3, VALUE_HEADS, VALUE_DIM, KEY_DIM)
    assert torch.equal(before_chunks[0, [0, 2]], before[[3, 1]])
    assert torch.equal(states[[0, 2]], before[[0, 2]])


def test_a_token_after_a_prompt_is_as_if_it_had_been_in_it():
    given, whole, parts = inputs(75), *(torch.zeros(2, 4, VALUE_HEADS, VALUE_DIM, KEY_DIM))
    out, _, _ = prompts(given, whole)
    shorter = {name: part[:, :69] if part.dim() == 4 else part for name, part in given.items()}
    shorter |= {"a": given["a"][:69], "b": given["b"][:69]}
    g, beta = mamba.fused_gdn_gating_cpu(shorter["A_log"], shorter["a"], shorter["b"], shorter["dt_bias"])
    mamba.chunk_gated_delta_rule_cpu(
        **{name: shorter[name] for name in ("q", "k", "v")},
        g=g,
        beta=beta,
        initial_state=parts,
        initial_state_indices=SLOTS[:1],
        cu_seqlens=torch.tensor([0, 69]),
        head_first=False,
        use_qk_l2norm_in_kernel=True,
    )
    last = mamba.fused_sigmoid_gating_delta_rule_update_cpu(
        A_log=given["A_log"],
        dt_bias=given["dt_bias"],
        **{name: given[name][:, 69:70] for name in ("q", "k", "v")},
        a=given["a"][69:70],
        b=given["b"][69:70],
        initial_state_source=parts,
        initial_state_indices=SLOTS[:1],
        cu_seqlens=torch.tensor([0, 1]),
    )
    torch.testing.assert_close(last[0, 0], out[0, 69])
    torch.testing.assert_close(parts[3], whole[3])


def test_the_convolution_goes_on_where_a_prompt_ended():
    inputs_ = torch.randn(CHANNELS, 75)
    weight, bias = torch.randn(CHANNELS, WIDTH), torch.randn(CHANNELS)
    padded = F.pad(inputs_[:, :70], (WIDTH - 1, 0)).unsqueeze(0)
    expected = F.silu(F.conv1d(padded, weight.unsqueeze(1), bias, groups=CHANNELS)[0])
    states = torch.randn(4, CHANNELS, WIDTH - 1)
    out = mamba.causal_conv1d_fn_cpu(
        inputs_[:, :69],
        weight,
        bias,
        activation="silu",
        conv_states=states,
        has_initial_state=torch.tensor([False]),
        cache_indices=SLOTS[:1],
        query_start_loc=torch.tensor([0, 69]),
    )
    torch.testing.assert_close(out, expected[:, :69])
    token = inputs_[:, 69].unsqueeze(0)
    last = mamba.causal_conv1d_update_cpu(token, states, weight, bias, "silu", conv_state_indices=SLOTS[:1])
    torch.testing.assert_close(last[0], expected[:, 69])
    torch.testing.assert_close(states[3], inputs_[:, 67:70])
