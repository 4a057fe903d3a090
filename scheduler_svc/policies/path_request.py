"""What a path policy may know about one request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class StoreQueue(NamedTuple):
    """One engine's storage link, over all its ranks."""

    read_queue_bytes: int = 0
    """Reported or planned already."""
    read_rate_bytes_per_s: float = 0.0
    """Measured drain rate; 0 while unknown."""


@dataclass(frozen=True, slots=True)
class PathRequest:
    """One request, both engines' own pages and their storage links."""

    prefill_local_pages: int
    """L_P."""
    decode_local_pages: int
    """L_D; may exceed K."""
    hit_pages: int
    """K."""
    page_bytes: int
    """Bytes of one page over all ranks of one engine."""
    prefill: StoreQueue
    decode: StoreQueue

    @property
    def least_split(self) -> int:
        """x of the pure prefill path: what the DE holds is forwarded, never read again."""
        return min(self.decode_local_pages, self.hit_pages)
