"""Puts the backend in the place of SGLang's own, under its name, and its hooks around SGLang's prefetch.

SGLang treats some backends by name: it lets `mooncake` store shards of decode context parallelism and the
draft model's KV of every rank, for instance, and not a `dynamic` one.
"""

from __future__ import annotations

from dualpath_sgl.lanes.forward import bound_mooncakes_patience
from dualpath_sgl.relay.client.prefetch import hooks
from dualpath_sgl.start.config import settings

NAME = "mooncake"


def register() -> None:
    """SGLang warns once that the name was taken."""
    from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

    bound_mooncakes_patience()
    StorageBackendFactory.register_backend(NAME, "dualpath_sgl.storage", "DualPathStorage")
    hooks.register(traced=settings().otlp_endpoint is not None)
