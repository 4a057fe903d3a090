"""SGLang plugin (entry point `dualpath_cpu`): what PD over Mooncake and HiCache lack on a CPU.

Does nothing unless `SGLANG_USE_CPU_ENGINE=1`.  SGLang only logs a plugin that raises;
`dualpath_sgl.launch.engine` therefore checks `activated` in every process of an engine.
"""

from __future__ import annotations

import functools
import os
import time

from dualpath_sgl.cpu_profile import hybrid

activated = False
"""True once `activate` has changed this process."""

_COPIES = (
    "transfer_kv_direct",
    "transfer_kv_per_layer_direct_pf_lf",
    "transfer_kv_all_layer_direct_lf_pf",
)

HOST_RESERVE_BYTES = 1 << 30
"""SGLang lets no host pool take the last 10 GiB of a host that serves; a cluster that is tried on a CPU has
pools of one, and machines of 16."""

POLL_S = 0.005
"""Between two looks of a scheduler that has no batch to run but requests under way.

One look takes 0.35 ms of SGLang's own work: every millisecond, two waiting engines would take half a core
from the threads that they wait for.
"""


def activate() -> None:
    global activated
    if activated or os.getenv("SGLANG_USE_CPU_ENGINE") != "1":
        return
    from sgl_kernel import kvcacheio
    from sglang.srt.disaggregation.mooncake.conn import MooncakeKVSender
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.mem_cache.pool_host import base, common, mamba, mha, mla
    from sglang.srt.mem_cache.pool_host.base import HostKVCache
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import (
        AttnForwardMethod,
    )

    # The alternative copies page indices through pinned memory behind a CUDA event.
    MooncakeKVSender.supports_host_tensor_indices = False
    HostKVCache.__init__ = _without_pinning(HostKVCache.__init__)
    common._cuda_host_register = lambda *_args, **_kwargs: None
    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = HOST_RESERVE_BYTES
    Scheduler.on_idle = _polling(Scheduler.on_idle)
    # These modules import the copies only on GPUs, then call them by their own globals.
    for module in (mha, mla, mamba):
        for name in _COPIES:
            setattr(module, name, getattr(kvcacheio, name))
    # An MLA model computes the first part of a prompt as plain multi-head attention elsewhere; the
    # torch-native backend reads keys and values from the pool, which holds the compressed vectors.
    AttentionBackendRegistry.register("torch_native", lambda attention, batch: AttnForwardMethod.MLA)
    # With DP attention batches are padded to one length; a padding request has one token, as elsewhere.
    TorchNativeAttnBackend.get_cpu_graph_seq_len_fill_value = lambda backend: 1
    hybrid.enable()
    activated = True


def _without_pinning(original):
    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **{**kwargs, "pin_memory": False})

    return __init__


def _polling(original):
    """SGLang spins while requests load or transfer: on a few cores, away from the threads that do so."""

    @functools.wraps(original)
    def on_idle(self):
        original(self)
        if not self.is_fully_idle():
            time.sleep(POLL_S)

    return on_idle
