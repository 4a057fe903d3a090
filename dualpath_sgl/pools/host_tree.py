"""What a prompt's prefix looks like in this rank's host pool (HiCache L2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache


@dataclass
class HostPrefix:
    """The part of a matched prefix whose bytes are whole in the host pool."""

    matched_tokens: int
    """Held on device or host."""
    tokens: int
    """Held on host, from the start without a gap; at most `matched_tokens`."""
    node: Any
    """Deepest matched tree node (SGLang NodeId)."""
    parts: list[tuple[Any, torch.Tensor]]
    """`(node, host token slots)` of every node that makes up `tokens`."""

    def host_indices(self) -> torch.Tensor:
        """Host token slots, int64 `[tokens]`."""
        return torch.cat([slots for _, slots in self.parts])

    def lock(self, tree: UnifiedRadixCache) -> Callable[[], None]:
        """Keep the host copies; the result undoes it, on SGLang's scheduler thread, once."""
        # Every node, not just the deepest: SGLang also drops host copies of inner nodes that
        # have a device copy.
        held = [(node, tree.inc_host_lock_ref(node).to_dec_params()) for node, _ in self.parts]

        def unlock() -> None:
            for node, params in held:
                tree.dec_host_lock_ref(node, params)

        return unlock


def held_on_host(tree: UnifiedRadixCache, req: Req) -> HostPrefix:
    """Match `req`'s prompt without reserving or loading anything.

    A node whose device-to-host copy is still under way does not count: its bytes are not whole.
    """
    from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
    from sglang.srt.mem_cache.common import _req_radix_key

    match = tree.match_prefix(MatchPrefixParams(key=_req_radix_key(tree, req, req.origin_input_ids), req=req))
    pending = {node for write in tree.ongoing_write_through.values() for node in write.publish_node_ids}
    parts: list[tuple[Any, torch.Tensor]] = []
    tokens = 0
    for info in tree.tree_core.collect_path_info([match.last_host_node])[0]:
        spec = tree.tree_core.build_storage_backup_spec(info.node_id, False)
        if spec is None or spec.host_value is None or info.node_id in pending:
            break
        parts.append((info.node_id, spec.host_value))
        tokens += len(spec.host_value)
    return HostPrefix(
        matched_tokens=match.device_prefix_len + match.host_hit_length,
        tokens=tokens,
        node=match.last_host_node,
        parts=parts,
    )


def holds_only_kv(tree: UnifiedRadixCache) -> bool:
    """Whether the model's cache is KV and nothing else: no Mamba states, sliding windows, indexers, drafts."""
    return len(tree.tree_components) == 1 and not tree.sidecar_pool_specs
