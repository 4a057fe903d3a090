"""HiCache's copies between device and host pools, backend `direct`, in plain torch.

On a CPU the "device" pool is ordinary memory.  Indices are token slots; source and
destination indices always cover whole pages in the same order.  Device buffers are one
tensor [slots, heads, dim] per layer.  Host buffers in layout `page_first_direct` are
[pages, layers, page_size, heads, dim], one for K and one for V (a single one for MLA).
"""


def transfer_kv_direct(src_layers, dst_layers, src_indices, dst_indices, page_size):
    """Copy tokens between layer-first buffers, layer by layer."""
    runs = _runs(src_indices, dst_indices, page_size)
    for source, destination in zip(src_layers, dst_layers, strict=True):
        for first, to, pages in runs:
            _slots(destination, to, pages, page_size).copy_(_slots(source, first, pages, page_size))


def transfer_kv_per_layer_direct_pf_lf(src_ptrs, dst_ptrs, src_indices, dst_indices, layer_id, page_size):
    """Host (page first) -> device, one layer: `src_ptrs` are whole pools, `dst_ptrs` that layer's tensors."""
    runs = _runs(src_indices, dst_indices, page_size)
    for source, destination in zip(src_ptrs, dst_ptrs, strict=True):
        for first, to, pages in runs:
            _slots(destination, to, pages, page_size).copy_(source[first : first + pages, layer_id])


def transfer_kv_all_layer_direct_lf_pf(src_ptrs, dst_ptrs, src_indices, dst_indices, page_size):
    """Device -> host (page first), every layer: `src_ptrs` lists all K layers, then all V layers."""
    runs = _runs(src_indices, dst_indices, page_size)
    layers = len(src_ptrs) // len(dst_ptrs)
    for position, source in enumerate(src_ptrs):
        destination = dst_ptrs[position // layers]
        for first, to, pages in runs:
            destination[to : to + pages, position % layers].copy_(_slots(source, first, pages, page_size))


def _runs(src_indices, dst_indices, page_size):
    """[(source page, destination page, pages)]: pages that follow each other on both sides are one copy.

    Gathering and scattering token by token makes a temporary of everything, at a quarter of the speed.
    """
    source, destination = src_indices[::page_size] // page_size, dst_indices[::page_size] // page_size
    breaks = ((source.diff() != 1) | (destination.diff() != 1)).nonzero().flatten() + 1
    starts = [0, *breaks.tolist()]
    ends = [*starts[1:], len(source)]
    source, destination = source.tolist(), destination.tolist()
    return [(source[a], destination[a], b - a) for a, b in zip(starts, ends, strict=True) if b > a]


def _slots(layer, page, pages, page_size):
    """`pages` pages of a layer-first buffer as [pages, page_size, ...], a view."""
    first = page * page_size
    return layer[first : first + pages * page_size].view(pages, page_size, *layer.shape[1:])


def __getattr__(name):
    if not name.startswith("transfer_kv_"):
        raise AttributeError(f"sgl_kernel.kvcacheio (CPU stand-in) has no {name}")

    def unavailable(*args, **kwargs):
        raise NotImplementedError(f"kvcacheio.{name} has no CPU stand-in: use --hicache-io-backend direct")

    return unavailable
