"""Mooncake's store client as far as SGLang's `MooncakeStore` calls it, over memory of this process.

Stands in below every line of SGLang and DualPath that makes keys, addresses and sizes: what a page is called
in the store is what it would be called in a real one.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import types
from collections.abc import Callable, Sequence

MISSING, FAILED = -704, -800
"""Mooncake's codes."""


class Pause:
    """A read that waits on its thread: `began` is set when it got there, it goes on when `over` is."""

    def __init__(self) -> None:
        self.began, self.over = threading.Event(), threading.Event()

    def wait(self) -> None:
        self.began.set()
        self.over.wait()


class RamStore:
    """Objects by key, shared by every client of this process.  Any thread."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.reads: list[list[str]] = []
        """Keys of every read, when it begins."""
        self.ended_reads = 0
        self._pauses: dict[int, Pause] = {}
        self.before_read: Callable[[Sequence[str]], None] = lambda keys: None
        """Called on the reading thread; may wait, or raise as a broken client would."""
        self.fails: Callable[[str], bool] = lambda key: False
        """Whether reading this key fails though it is there."""

    def pause(self, nth: int = 1) -> Pause:
        """The `nth` read from now on will wait."""
        return self._pauses.setdefault(len(self.reads) + nth, Pause())

    def install(self) -> None:
        """From now on SGLang's `MooncakeStore` finds these clients instead of Mooncake's."""
        module = types.ModuleType("mooncake.store")
        module.MooncakeDistributedStore = lambda: Client(self)
        sys.modules["mooncake.store"] = module


class Client:
    def __init__(self, store: RamStore) -> None:
        self._store = store

    def setup(self, *_args, **_kwargs) -> int:
        return 0

    def register_buffer(self, _pointer: int, _size: int) -> int:
        return 0

    def put(self, key: str, value: bytes) -> int:
        self._store.objects.setdefault(key, bytes(value))
        return 0

    def get(self, key: str) -> bytes:
        return self._store.objects.get(key, b"")

    def is_exist(self, key: str) -> int:
        return int(key in self._store.objects)

    def batch_is_exist(self, keys: list[str]) -> list[int]:
        return [self.is_exist(key) for key in keys]

    def batch_get_into(self, keys: list[str], pointers: list[int], sizes: list[int]) -> list[int]:
        store = self._store
        store.reads.append(list(keys))
        try:
            pause = store._pauses.get(len(store.reads))
            if pause is not None:
                pause.wait()
            store.before_read(keys)
            return [self._get_into(*object_) for object_ in zip(keys, pointers, sizes, strict=True)]
        finally:
            store.ended_reads += 1

    def _get_into(self, key: str, pointer: int, size: int) -> int:
        value = self._store.objects.get(key)
        if value is None:
            return MISSING
        if self._store.fails(key) or len(value) != size:
            return FAILED
        ctypes.memmove(pointer, value, size)
        return size

    def batch_put_from(self, keys: list[str], pointers: list[int], sizes: list[int]) -> list[int]:
        return [
            self.put(key, ctypes.string_at(pointer, size))
            for key, pointer, size in zip(keys, pointers, sizes, strict=True)
        ]

    def remove_all(self) -> int:
        self._store.objects.clear()
        return 0
