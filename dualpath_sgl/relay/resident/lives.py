"""Until when the bytes of a host page are the same.

SGLang gives a page back to its pool before it is written anew, and at no other time.  Each page's lives are
counted: one ends in `free` and `clear`, before the pool can give its memory to anybody.  Whoever has seen a
page in one life and finds it in the same life later has seen the same bytes all that time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from dualpath_sgl.threads import faults

logger = logging.getLogger(__name__)

OURS = "_dualpath_lives"
"""Attribute of a pool that is followed."""


class Pages(NamedTuple):
    """Pages as they are now: of the same pool, equally long."""

    lives: Lives
    numbers: list[int]
    counts: list[int]
    """The life that each is in."""


class Lives:
    """One pool's.  SGLang's scheduler thread ends lives, any thread looks."""

    def __init__(self, pages: int, page_tokens: int) -> None:
        self._page_tokens = page_tokens
        self._counts = np.zeros(pages, np.int64)
        self._count_of = self._counts.data

    def now(self, host_indices: torch.Tensor) -> Pages | None:
        """Of whole pages, `n * page_tokens` slots of the pool; None when they are not whole."""
        numbers = self._whole(host_indices.numpy())
        return None if numbers is None else Pages(self, numbers.tolist(), self._counts[numbers].tolist())

    def lasts(self, page: int, count: int) -> bool:
        """Whether a page is in that life still."""
        return self._count_of[page] == count

    def end(self, host_indices: torch.Tensor) -> None:
        """Their bytes may change from now on."""
        slots = host_indices.cpu().numpy()
        numbers = self._whole(slots)
        self._counts[slots // self._page_tokens if numbers is None else numbers] += 1

    def end_all(self) -> None:
        self._counts += 1

    def _whole(self, slots: np.ndarray) -> np.ndarray | None:
        """A few numbers for many slots: this runs between SGLang's steps."""
        firsts = slots[:: self._page_tokens]
        if len(slots) % self._page_tokens or (firsts % self._page_tokens).any():
            return None
        numbers: np.ndarray = firsts // self._page_tokens
        return numbers


def lives_of(pool: Any) -> Lives | None:
    """Those of SGLang's host pool, followed from the first call on.

    None for a pool that gives memory back in ways of its own.
    """
    from sglang.srt.mem_cache.pool_host.base import HostKVCache

    kind = type(pool)
    if not isinstance(pool, HostKVCache) or pool.dcp_size > 1:
        return None
    if (kind.free, kind.clear, kind.alloc) != (HostKVCache.free, HostKVCache.clear, HostKVCache.alloc):
        return None
    if not hasattr(pool, OURS):
        lives = Lives(pool.size // pool.page_size, pool.page_size)
        pool.free = _before(pool.free, lives, lives.end)
        pool.clear = _before(pool.clear, lives, lives.end_all)
        setattr(pool, OURS, lives)
    found: Lives = getattr(pool, OURS)
    return found


def _before(original: Callable[..., Any], lives: Lives, end: Callable[..., None]) -> Callable[..., Any]:
    def ended(*arguments: Any) -> Any:
        try:
            end(*arguments)
        except Exception:
            faults.record("nothing of a host pool is forwarded that lay there before")
            lives.end_all()
        return original(*arguments)

    return ended
