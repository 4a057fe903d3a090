"""Who may help: the relays that a prefill engine knows of."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

from scheduler_svc.wire.addresses import check_endpoint


class Helper(NamedTuple):
    name: str
    """The relay's; with CURVE its public key is `NAME.key`."""
    endpoint: str
    """`tcp://HOST:PORT` of its ZeroMQ socket."""


class Relays:
    """The present list.  Whoever knows better replaces it, on any thread."""

    def __init__(self, helpers: Iterable[Helper] = ()) -> None:
        self._lock = threading.Lock()
        self._helpers = tuple(helpers)
        self._followers: list[Callable[[tuple[Helper, ...]], None]] = []

    @property
    def helpers(self) -> tuple[Helper, ...]:
        return self._helpers

    def replace(self, helpers: Iterable[Helper]) -> None:
        """From now on these may help and no others."""
        with self._lock:
            self._helpers = tuple(helpers)
            for follower in self._followers:
                follower(self._helpers)

    def follow(self, follower: Callable[[tuple[Helper, ...]], None]) -> None:
        """Call it with the list now, and with each later one."""
        with self._lock:
            self._followers.append(follower)
            follower(self._helpers)


def parse_helper(text: str) -> Helper:
    """`NAME=tcp://HOST:PORT`.  Raises ValueError."""
    name, equals, endpoint = text.partition("=")
    if not name or not equals:
        raise ValueError(f"relay {text!r} is not NAME=tcp://HOST:PORT")
    check_endpoint(endpoint)
    return Helper(name, endpoint)
