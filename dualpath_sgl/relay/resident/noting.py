"""The part of SGLang's Mooncake backend that notes which key lies where in the host pool.

Whatever SGLang writes to the store lies whole in its host memory, and so does what it has read from there.
Both come by here with keys and addresses, on SGLang's storage threads.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.storage.mooncake_store.mooncake_store import MooncakeStore

from dualpath_sgl.pools.layout import digest
from dualpath_sgl.relay.resident.index import Index
from dualpath_sgl.relay.resident.lives import Lives, Pages
from dualpath_sgl.threads import faults


class _Call(threading.local):
    """One of a storage thread's calls into the backend."""

    writes = False
    reading: tuple[Sequence[str], Pages] | None = None
    """Keys that are about to be read, and the pages that they go to."""


class NotingStore(MooncakeStore):  # type: ignore[misc]
    """Notes nothing before `note_in`."""

    def __init__(self, *arguments: Any) -> None:
        self._index: Index | None = None
        self._lives: Lives | None = None
        self._call = _Call()
        super().__init__(*arguments)

    def note_in(self, index: Index, lives: Lives) -> None:
        """From now on, of the KV host pool whose `lives` these are."""
        self._index, self._lives = index, lives

    def note_no_more(self) -> None:
        if self._index is not None:
            self._index.clear()
        self._index = self._lives = None

    def _name_objects(self) -> str | None:
        """A name that ranks have in common if, of equal pages, their objects have equal keys and sizes.

        None when a page of the KV pool does not lie in objects of one piece each.
        """
        if getattr(self.mem_pool_host, "kv_buffer", None) is None:
            return None
        try:
            one_page = torch.arange(self.mem_pool_host.page_size)
            suffixes, addresses, sizes = MooncakeStore._batch_preprocess(self, [""], one_page)
        except Exception:
            faults.record("nothing is taken from decode engines by key, nor given")
            return None
        if isinstance(addresses[0], Sequence):
            return None
        return digest([self.config_prefix, suffixes, list(sizes)])

    def batch_set_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        self._call.writes = True
        try:
            done: list[bool] = super().batch_set_v1(keys, host_indices, extra_info)
            return done
        finally:
            self._call.writes = False

    def _batch_preprocess(self, keys: list[str], host_indices: Any) -> tuple[list[str], list[Any], list[Any]]:
        """SGLang's own names, addresses and sizes of the objects of these pages."""
        names, addresses, sizes = super()._batch_preprocess(keys, host_indices)
        if self._lives is not None:
            try:
                self._see(self._lives, names, addresses, sizes, host_indices)
            except Exception:
                faults.record("%d pages are not served to prefill engines", len(keys))
        return names, addresses, sizes

    def _get_batch_zero_copy_impl(
        self, key_strs: list[str], buffer_ptrs: list[Any], buffer_sizes: list[Any]
    ) -> list[int]:
        results: list[int] = super()._get_batch_zero_copy_impl(key_strs, buffer_ptrs, buffer_sizes)
        self.note_read(key_strs, buffer_ptrs, buffer_sizes, results)
        return results

    def note_read(
        self, names: Sequence[str], addresses: Sequence[Any], sizes: Sequence[Any], results: Sequence[int]
    ) -> None:
        """So much of each object has been read to its address."""
        reading, self._call.reading = self._call.reading, None
        if reading is None or reading[0] is not names or self._index is None:
            return
        try:
            pages = reading[1]
            parts = len(names) // len(pages.numbers)
            whole = [got == size for got, size in zip(results, sizes, strict=True)]
            for page, (number, count) in enumerate(zip(pages.numbers, pages.counts, strict=True)):
                of_page = slice(page * parts, (page + 1) * parts)
                if all(whole[of_page]):
                    one = Pages(pages.lives, [number], [count])
                    self._index.note(names[of_page], addresses[of_page], sizes[of_page], one)
        except Exception:
            faults.record("%d objects are not served to prefill engines", len(names))

    def _see(
        self, lives: Lives, names: list[str], addresses: list[Any], sizes: list[Any], host_indices: Any
    ) -> None:
        if isinstance(addresses[0], Sequence):
            return  # in blocks of layers: no page of it lies in one piece
        pages = lives.now(host_indices)
        if pages is None or self._index is None:
            return
        if self._call.writes:
            self._index.note(names, addresses, sizes, pages)
        else:
            self._call.reading = names, pages
