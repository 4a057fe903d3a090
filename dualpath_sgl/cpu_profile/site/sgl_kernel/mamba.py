"""The operators of gated linear attention (Qwen3-Next's GDN), in plain torch, one token after another.

A layer's state of one request has two parts: `conv` [channels, width - 1], the last inputs of a short
convolution, and `temporal` [value heads, value dim, key dim].  Slots of both are rows of a pool; a request's
slot is given by an index, below 0 for padding.  Tokens of several requests follow each other in one tensor.
"""

import itertools

import torch
import torch.nn.functional as F

CHUNK_TOKENS = 64
"""SGLang takes the states of a prompt's prefixes at multiples of so many tokens."""


def causal_conv1d_fn_cpu(
    x,
    weight,
    bias,
    *,
    activation,
    conv_states,
    has_initial_state,
    cache_indices,
    query_start_loc,
    **_,
):
    """Prompts: `x` [channels, tokens] -> the same shape; `conv_states` is changed in place."""
    out = torch.empty_like(x)
    starts = query_start_loc.tolist()
    for request, (start, end) in enumerate(itertools.pairwise(starts)):
        slot = int(cache_indices[request])
        if slot < 0 or start == end:
            continue
        state = conv_states[slot]
        before = state if has_initial_state[request] else torch.zeros_like(state)
        window = torch.cat([before.to(x.dtype), x[:, start:end]], dim=1)
        out[:, start:end] = _convolved(window, weight, bias, activation)
        state.copy_(window[:, -state.shape[1] :])
    return out


def causal_conv1d_update_cpu(x, conv_state, weight, bias, activation, *, conv_state_indices):
    """One token of each request: `x` [requests, channels] -> the same shape."""
    out = torch.empty_like(x)
    for request, slot in enumerate(conv_state_indices.tolist()):
        if slot >= 0:
            state = conv_state[slot]
            window = torch.cat([state.to(x.dtype), x[request].unsqueeze(1)], dim=1)
            out[request] = _convolved(window, weight, bias, activation).squeeze(1)
            state.copy_(window[:, 1:])
    return out


def _convolved(window, weight, bias, activation):
    """`window` [channels, width - 1 + tokens], `weight` [channels, width] -> [channels, tokens]."""
    out = F.conv1d(window.unsqueeze(0), weight.unsqueeze(1), bias, groups=len(weight)).squeeze(0)
    return F.silu(out) if activation in ("silu", "swish") else out


def fused_gdn_gating_cpu(A_log, a, b, dt_bias):
    """Decay (its logarithm) and strength of each token's update, both [1, tokens, value heads]."""
    g = -A_log.float().exp() * F.softplus(a.float() + dt_bias.float())
    return g.unsqueeze(0), b.float().sigmoid().unsqueeze(0)


def chunk_gated_delta_rule_cpu(
    *, q, k, v, g, beta, initial_state, initial_state_indices, cu_seqlens, head_first, use_qk_l2norm_in_kernel
):
    """Prompts: `q`, `k` [1, tokens, key heads, key dim], `v` [1, tokens, value heads, value dim].

    Returns the output in the shape of `v`, nothing, and the states before each chunk of each request
    [1, chunks, ...]; `initial_state`, the pool, is changed in place.
    """
    out, before_chunks = torch.empty_like(v), []
    starts = cu_seqlens.tolist()
    for request, (start, end) in enumerate(itertools.pairwise(starts)):
        slot = int(initial_state_indices[request])
        if slot < 0:
            continue
        state = initial_state[slot].float()
        for token in range(start, end):
            if (token - start) % CHUNK_TOKENS == 0:
                before_chunks.append(state.clone())
            out[0, token], state = _step(state, *(part[0, token] for part in (q, k, v, g, beta)))
        initial_state[slot] = state.to(initial_state.dtype)
    return out, None, torch.stack(before_chunks).unsqueeze(0) if before_chunks else None


def fused_sigmoid_gating_delta_rule_update_cpu(
    *, A_log, dt_bias, q, k, v, a, b, initial_state_source, initial_state_indices, cu_seqlens, **_
):
    """One token of each request, otherwise as above; returns the output."""
    g, beta = fused_gdn_gating_cpu(A_log, a, b, dt_bias)
    out = torch.empty_like(v)
    for request, slot in enumerate(initial_state_indices.tolist()):
        if slot >= 0:
            state = initial_state_source[slot].float()
            out[0, request], state = _step(state, *(part[0, request] for part in (q, k, v, g, beta)))
            initial_state_source[slot] = state.to(initial_state_source.dtype)
    return out


def _step(state, q, k, v, g, beta):
    """The gated delta rule for one token: its output, and the state after it."""
    each = len(v) // len(q)  # value heads of a key head
    q, k = (
        F.normalize(part.float(), dim=-1, eps=1e-6).repeat_interleave(each, dim=0).unsqueeze(-1)
        for part in (q, k)
    )
    state = state * g.exp()[:, None, None]
    change = (v.float().unsqueeze(-1) - state @ k) * beta[:, None, None]
    state = state + change @ k.transpose(-1, -2)
    out = (state @ q).squeeze(-1) * q.shape[-2] ** -0.5
    return out.to(v.dtype), state


def fused_rmsnorm_gated_cpu(x, weight, gate, eps):
    """[..., width], normed over the width and gated by SiLU."""
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).mul(F.silu(gate.float())).to(x.dtype)


def track_mamba_states_if_needed(
    conv_states, ssm_states, cache_indices, mamba_track_mask, mamba_track_indices, batch_size, **_
):
    """Copies the states of requests that stand at a boundary into slots that the prefix cache keeps."""
    rows = mamba_track_mask[:batch_size].nonzero().flatten()
    for states in (conv_states, ssm_states):
        states[mamba_track_indices[rows]] = states[cache_indices[rows]]


def gate_sigmoid_mul(hidden_states, gate_weight, shared_output, output, *, do_add):
    """A shared expert's part of each token, into `output` [tokens, width]."""
    gated = (hidden_states @ gate_weight).sigmoid().unsqueeze(-1) * shared_output
    output.copy_(output + gated if do_add else gated)


# SGLang asks for these as operators of torch.
for operator in (fused_gdn_gating_cpu, fused_sigmoid_gating_delta_rule_update_cpu, fused_rmsnorm_gated_cpu):
    setattr(torch.ops.sgl_kernel, operator.__name__, operator)
