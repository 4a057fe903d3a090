"""Which relay reads what, when several ranks ask for the same objects.

Ranks of a model with one latent KV for all heads (MLA) each load every page.  They all ask the same
relay for an object, so that it is read from the store once.  They know nothing of each other: a hash
chooses, and when a relay joins or leaves, only its own share moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

GROUP_BYTES = 1024 * 1024
"""Neighbours in the list stay together up to this size."""


def spread(keys: Sequence[str], sizes: Sequence[int], relays: Sequence[str]) -> list[str]:
    """The relay of each object, out of `relays` (at least one)."""
    chosen: list[str] = []
    group_bytes = GROUP_BYTES
    for key, size in zip(keys, sizes, strict=True):
        if group_bytes + size > GROUP_BYTES:
            group_bytes = 0
            relay = max(relays, key=lambda relay: _weight(key, relay))
        group_bytes += size
        chosen.append(relay)
    return chosen


def _weight(key: str, relay: str) -> bytes:
    return blake2b(f"{relay}\n{key}".encode(), digest_size=8).digest()
