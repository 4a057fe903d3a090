"""What a node is made of.  Every number has its source; none comes from a result it is compared with."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

GB = 1e9
TFLOP = 1e12

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Hardware(BaseModel):
    """A node of the paper's cluster by default (sections 2 and 7)."""

    model_config = ConfigDict(frozen=True)

    gpus_per_node: Annotated[int, Field(ge=1, le=64)] = 8
    """Paper, section 2: 8 Hopper GPUs a node; one engine is one GPU."""

    storage_bytes_per_s: Positive = 50 * GB
    """One node's storage NIC.  Paper, sections 2 and 7: one 400 Gbit/s NIC a node, which the
    storage client saturates."""

    compute_bytes_per_s: Positive = 50 * GB
    """One GPU's compute NIC, each direction.  Paper, section 2: one 400 Gbit/s NIC a GPU.  Local
    copies between host and GPU go through it too (section 5)."""

    prefill_flop_per_s: Positive = 298 * TFLOP
    """Sustained by one GPU in prefill.  ASSUMPTION: the paper gives no compute throughput.  DeepSeek's
    own report on serving V3 with these engines' kernels (open-infra-index, "DeepSeek-V3/R1 Inference
    System Overview", 2025) says 73.7 k prompt tokens/s a node of 8 H800 with 56.3 % cache hits; the
    rest at 2 x 37 GFLOP a token is 298 TFLOP/s a GPU."""

    hbm_bytes: Positive = 80 * GB
    """ASSUMPTION: the paper says Hopper and no size; H800 and H100 have 80 GB."""

    hbm_usable: Annotated[float, Field(gt=0, le=1)] = 0.9
    """ASSUMPTION: the share that weights and KV may take; the rest is activations and buffers."""

    hbm_bytes_per_s: Positive = 3350 * GB
    """Public data sheet of H800 and H100 SXM."""

    attention_quota_s: Positive = 0.3
    """Attention time of one prefill step on one engine.  Paper, section 6.2 and appendix A.4."""

    layer_step_s: Positive = 0.00047
    """A step's least time for one layer, however small its batch (launches, EP dispatch and combine,
    reading weights).  ASSUMPTION for prefill and decode alike, from the paper's TPOT of 36 ms at
    44P88D and 8.8 APS: 8.8 agents/s x 157 turns x 176 tokens x 0.036 s / 704 engines = 12.4 sequences
    an engine, whose own work (`Model.decode_sequence_s`, 0.57 ms each) leaves 28.9 ms for 61 layers.
    TPOT is a published result, but not one of those compared."""
