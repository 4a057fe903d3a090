"""The paper's models: bytes of KV and FLOPs of computing, from their published dimensions.

Checked against the paper's own ratio of cache bytes to compute: 22 GB/PFLOP for DeepSeek-V3.2
with 429 tokens appended to 32.7K (section 2, table 1); see tests/sim.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from dualpath_sgl.evals.sim.model.hardware import Hardware


class Work(NamedTuple):
    """FLOPs of one prefill, split by who shares the work."""

    attention: float
    """On the engine that has the request (data parallel)."""
    experts: float
    """Spread over the engines of the group when they are expert parallel."""


class Model(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def layers(self) -> int: ...

    @property
    def kv_bytes_per_token(self) -> int: ...

    @property
    def expert_weight_bytes(self) -> float:
        """Spread over an expert-parallel group."""

    @property
    def other_weight_bytes(self) -> float:
        """On every engine."""

    @property
    def prefill_group_nodes(self) -> int:
        """Nodes of prefill engines that step together; 0: every engine steps alone."""

    @property
    def decode_group_nodes(self) -> int: ...

    def prefill_work(self, new_tokens: int, context_tokens: int) -> Work:
        """To compute `new_tokens` behind `context_tokens` that are stored."""

    def decode_sequence_s(self, context_tokens: float, hardware: Hardware) -> float:
        """What one more sequence adds to a decode step."""


KV_RANK = 512
ROPE = 64
HEAD = 128
"""MLA's dimensions in every published DeepSeek configuration."""


class SparseMoE(NamedTuple):
    """DeepSeek with latent attention (MLA), a sparse-attention indexer and experts."""

    name: str
    layers: int
    dense_layers: int
    hidden: int
    heads: int
    q_rank: int
    """0: no low-rank Q."""
    dense_inner: int
    expert_inner: int
    experts: int
    active_experts: int
    """Routed ones of one token."""
    shared_experts: int
    index_heads: int
    index_dim: int
    top_k: int
    """Keys that attention looks at."""
    prefill_group_nodes: int
    decode_group_nodes: int
    token_bytes: int = 656
    """KV of one token and layer.  Paper, derived sizes: 512 values of one byte, 16 B of scales, 128 B
    of RoPE; without the indexer's 132 B, as the paper counts for its GB/PFLOP."""

    @property
    def kv_bytes_per_token(self) -> int:
        return self.token_bytes * self.layers

    @property
    def _attention_weights(self) -> int:
        """Weights of one layer's attention, indexer included."""
        head_q, source = HEAD + ROPE, self.q_rank or self.hidden
        q = source * self.heads * head_q + self.hidden * self.q_rank
        kv = self.hidden * (KV_RANK + ROPE) + KV_RANK * self.heads * 2 * HEAD
        out = self.heads * HEAD * self.hidden
        index = source * self.index_heads * self.index_dim + self.hidden * (self.index_dim + self.index_heads)
        return q + kv + out + index

    @property
    def _active_expert_weights(self) -> int:
        """Over all layers, of one token; dense layers count as experts."""
        moe_layers = self.layers - self.dense_layers
        expert = 3 * self.hidden * self.expert_inner
        dense = 3 * self.hidden * self.dense_inner * self.dense_layers
        return (self.active_experts + self.shared_experts) * expert * moe_layers + dense

    @property
    def expert_weight_bytes(self) -> float:
        """One byte a weight (FP8)."""
        return self.experts * 3 * self.hidden * self.expert_inner * (self.layers - self.dense_layers)

    @property
    def other_weight_bytes(self) -> float:
        shared = self.shared_experts * 3 * self.hidden * self.expert_inner * (self.layers - self.dense_layers)
        dense = 3 * self.hidden * self.dense_inner * self.dense_layers
        return self._attention_weights * self.layers + shared + dense

    def prefill_work(self, new_tokens: int, context_tokens: int) -> Work:
        keys = context_tokens + new_tokens / 2
        attended = min(keys, self.top_k)
        core = 2 * self.heads * (2 * KV_RANK + ROPE) * attended
        index = 2 * self.index_heads * self.index_dim * keys
        attention = (2 * self._attention_weights + core + index) * self.layers
        return Work(attention * new_tokens, 2 * self._active_expert_weights * new_tokens)

    def decode_sequence_s(self, context_tokens: float, hardware: Hardware) -> float:
        """Its FLOPs at the prefill rate, and its keys read from HBM: indexer keys of the whole
        context, latents of the chosen ones."""
        work = self.prefill_work(1, int(context_tokens))
        index_bytes = self.index_dim + 4
        read_bytes = self.layers * (
            context_tokens * index_bytes + min(context_tokens, self.top_k) * self.token_bytes
        )
        return sum(work) / hardware.prefill_flop_per_s + read_bytes / hardware.hbm_bytes_per_s


class Dense(NamedTuple):
    """A dense transformer with grouped-query attention, one whole copy on every GPU."""

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head: int
    value_bytes: int
    """Size of a weight and of a KV value."""
    prefill_group_nodes: int = 0
    decode_group_nodes: int = 0

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head * self.value_bytes

    @property
    def _weights(self) -> int:
        attention = self.hidden * self.head * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.inner)

    @property
    def expert_weight_bytes(self) -> float:
        return 0.0

    @property
    def other_weight_bytes(self) -> float:
        return self._weights * self.value_bytes

    def prefill_work(self, new_tokens: int, context_tokens: int) -> Work:
        keys = context_tokens + new_tokens / 2
        attention = 4 * self.layers * self.heads * self.head * keys
        return Work((attention + 2 * self._weights) * new_tokens, 0.0)

    def decode_sequence_s(self, context_tokens: float, hardware: Hardware) -> float:
        """FLOPs at the prefill rate and all of its KV read from HBM."""
        work = self.prefill_work(1, int(context_tokens))
        read_bytes = context_tokens * self.kv_bytes_per_token
        return sum(work) / hardware.prefill_flop_per_s + read_bytes / hardware.hbm_bytes_per_s


DS_660B = SparseMoE(
    "ds-660b", layers=61, dense_layers=3, hidden=7168, heads=128, q_rank=1536, dense_inner=18432,
    expert_inner=2048, experts=256, active_experts=8, shared_experts=1, index_heads=64, index_dim=128,
    top_k=2048, prefill_group_nodes=2, decode_group_nodes=4,
)  # fmt: skip
"""DeepSeek-V3.2, its published configuration.  ASSUMPTION: an expert-parallel group is the nodes of
one role in the paper's unit, 2P4D."""

DS_27B = SparseMoE(
    "ds-27b", layers=30, dense_layers=1, hidden=2560, heads=32, q_rank=0, dense_inner=12288,
    expert_inner=1536, experts=72, active_experts=6, shared_experts=2, index_heads=32, index_dim=64,
    top_k=1024, prefill_group_nodes=1, decode_group_nodes=1,
)  # fmt: skip
"""Paper, section 7, models.  ASSUMPTION: an expert-parallel group is one node, its unit being 1P1D."""

QWEN_32B = Dense(
    "qwen-32b", layers=64, hidden=5120, inner=27648, heads=40, kv_heads=8, head=128, value_bytes=2
)
"""Qwen2.5-32B, its published configuration; 256 KiB a token as in the paper's derived sizes."""

MODELS: dict[str, Model] = {model.name: model for model in (DS_660B, DS_27B, QWEN_32B)}
