"""Which of SGLang's calls the present thread makes: a backend is told keys and addresses, and nothing more."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(eq=False)
class Call:
    request_id: str = ""
    traceparent: str | None = None
    """Of the request's trace."""
    given_up: bool = False
    """Nobody wants its bytes any more; it may end with nothing."""


_thread = threading.local()


def present() -> Call:
    """The one that is made by this thread; one of nobody's when that is not known."""
    call: Call | None = getattr(_thread, "call", None)
    return call if call is not None else Call()


@contextmanager
def making(call: Call) -> Iterator[None]:
    """What this thread does meanwhile belongs to it."""
    before = getattr(_thread, "call", None)
    _thread.call = call
    try:
        yield
    finally:
        _thread.call = before
