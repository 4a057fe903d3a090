"""Stand-in for SGLang's kernel package on a CPU, in plain torch.

SGLang imports names from here whenever `SGLANG_USE_CPU_ENGINE=1`, also where the compiled
kernels are not used.  What the torch-native backends really call is implemented; any other
`*_cpu` kernel can be imported and raises when called.
"""

__version__ = "0.0.0+dualpath.cpu"


def assign_req_to_token_pool_cpu(
    req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, pool_len
):
    """Write each request's new KV slots into its row of the request-to-token table.

    `req_pool_indices`, `start_offset`, `end_offset`: [requests]; `req_to_token`: [rows, pool_len],
    changed in place; `out_cache_loc`: the slots of all requests, one after another.
    """
    taken = 0
    requests = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
    for row, start, end in requests:
        count = end - start
        req_to_token[row, start:end] = out_cache_loc[taken : taken + count].to(req_to_token.dtype)
        taken += count


def __getattr__(name):
    if not name.endswith("_cpu"):
        raise AttributeError(f"sgl_kernel (CPU stand-in) has no {name}")

    def unavailable(*args, **kwargs):
        raise NotImplementedError(
            f"sgl_kernel.{name} has no CPU stand-in: use --attention-backend torch_native"
        )

    return unavailable
