"""What models with sliding windows or linear attention beside full attention lack on a CPU."""

from __future__ import annotations

import functools


def enable() -> None:
    import torch
    from sgl_kernel import mamba
    from sglang.kernels.ops.attention.fla import fused_norm_gate
    from sglang.kernels.ops.elementwise import elementwise
    from sglang.srt.arg_groups import mamba_hook
    from sglang.srt.layers.attention import hybrid_linear_attn_backend
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    for name in ("_run_sdpa_forward_extend", "_run_sdpa_forward_decode"):
        setattr(TorchNativeAttnBackend, name, _in_its_pool(getattr(TorchNativeAttnBackend, name)))
    # SGLang says that no CPU can copy the states that a prefix cache keeps: on GPUs a kernel of Triton does it.
    mamba_hook._platform_supports_mamba_cache_extra_buffer = lambda: True
    hybrid_linear_attn_backend.track_mamba_states_if_needed = mamba.track_mamba_states_if_needed
    hybrid_linear_attn_backend.MambaAttnBackendBase._track_pools = lambda backend: None
    fused_norm_gate._use_cpu = True  # otherwise only with AMX
    elementwise._launch_fused_gate_sigmoid_mul = mamba.gate_sigmoid_mul
    torch.Tensor.pin_memory = lambda tensor: tensor


def _in_its_pool(original):
    """Layers with a sliding window have a pool of their own, and slots of their own in it: the backend
    writes there, but reads by the slots of the other pool.
    """

    @functools.wraps(original)
    def run(self, query, output, k_cache, v_cache, req_to_token, req_pool_indices, *args, **kwargs):
        if self.use_sliding_window_kv_pool and kwargs["sliding_window_size"] is not None:
            slots = req_to_token[req_pool_indices]
            req_to_token = self.token_to_kv_pool.translate_loc_from_full_to_swa(slots)
            req_pool_indices = range(len(slots))
        return original(
            self, query, output, k_cache, v_cache, req_to_token, req_pool_indices, *args, **kwargs
        )

    return run
