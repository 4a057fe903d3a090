"""HiCache's copies between device and host pools, backend `direct`, in plain torch.

On a CPU the "device" pool is ordinary memory.  Indices are token slots; source and
destination indices always cover whole pages in the same order.  Device buffers are one
tensor [slots, heads, dim] per layer.  Host buffers in layout `page_first_direct` are
[pages, layers, page_size, heads, dim], one for K and one for V (a single one for MLA).
"""


def transfer_kv_direct(src_layers, dst_layers, src_indices, dst_indices, page_size):
    """Copy tokens between layer-first buffers, layer by layer."""
    for source, destination in zip(src_layers, dst_layers, strict=True):
        destination[dst_indices] = source[src_indices]


def transfer_kv_per_layer_direct_pf_lf(src_ptrs, dst_ptrs, src_indices, dst_indices, layer_id, page_size):
    """Host (page first) -> device, one layer: `src_ptrs` are whole pools, `dst_ptrs` that layer's tensors."""
    pages, offsets = src_indices // page_size, src_indices % page_size
    for source, destination in zip(src_ptrs, dst_ptrs, strict=True):
        destination[dst_indices] = source[pages, layer_id, offsets]


def transfer_kv_all_layer_direct_lf_pf(src_ptrs, dst_ptrs, src_indices, dst_indices, page_size):
    """Device -> host (page first), every layer: `src_ptrs` lists all K layers, then all V layers."""
    pages, offsets = dst_indices // page_size, dst_indices % page_size
    layers = len(src_ptrs) // len(dst_ptrs)
    for position, source in enumerate(src_ptrs):
        dst_ptrs[position // layers][pages, position % layers, offsets] = source[src_indices]


def __getattr__(name):
    if not name.startswith("transfer_kv_"):
        raise AttributeError(f"sgl_kernel.kvcacheio (CPU stand-in) has no {name}")

    def unavailable(*args, **kwargs):
        raise NotImplementedError(f"kvcacheio.{name} has no CPU stand-in: use --hicache-io-backend direct")

    return unavailable
