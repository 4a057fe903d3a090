"""Who may help: relays and decode engines that hold objects, from the scheduler, or relays from an engine's flags."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple

from scheduler_svc.wire.addresses import check_endpoint
from scheduler_svc.wire.protocol import Helpers


class Kind(StrEnum):
    RELAY = "relay"
    """Reads from the store whatever it is asked for."""
    RESIDENT = "resident"
    """One rank of a decode engine, which has what lies in its host memory."""


class Helper(NamedTuple):
    name: str
    """The relay's or the decode engine's; with CURVE its public key is `NAME.key`."""
    endpoint: str
    """`tcp://HOST:PORT` of its ZeroMQ socket."""
    kind: Kind = Kind.RELAY
    rank: int = 0
    """Of a decode engine: its ranks have the same name."""

    @property
    def label(self) -> str:
        """A name that no other helper has."""
        return self.name if self.kind is Kind.RELAY else f"{self.name}#{self.rank}"


class Relays:
    """The present list.  Whoever knows better replaces it, on any thread."""

    def __init__(self, helpers: Iterable[Helper] = ()) -> None:
        self._lock = threading.Lock()
        self._helpers = tuple(helpers)
        self._shares: Mapping[str, float] = MappingProxyType({})
        self._followers: list[Callable[[tuple[Helper, ...]], None]] = []

    @property
    def helpers(self) -> tuple[Helper, ...]:
        return self._helpers

    def take(self, helpers: Helpers) -> None:
        """What the scheduler says."""
        relays = [Helper(relay.name, relay.endpoint) for relay in helpers.relays]
        residents = [Helper(one.name, one.endpoint, Kind.RESIDENT, one.rank) for one in helpers.residents]
        self.replace([*relays, *residents], {relay.name: relay.share for relay in helpers.relays})

    def share(self, label: str) -> float:
        """Of what the helper of that label may be asked ahead, this engine's part; 0: it is asked for nothing."""
        return self._shares.get(label, 1.0)

    def replace(self, helpers: Iterable[Helper], shares: Mapping[str, float] = MappingProxyType({})) -> None:
        """From now on these may help and no others.  `shares` by label, 1 where there is none."""
        with self._lock:
            self._helpers, self._shares = tuple(helpers), shares
            for follower in self._followers:
                follower(self._helpers)

    def follow(self, follower: Callable[[tuple[Helper, ...]], None]) -> None:
        """Call it with the list now, and with each later one."""
        with self._lock:
            self._followers.append(follower)
            follower(self._helpers)

    def unfollow(self, follower: Callable[[tuple[Helper, ...]], None]) -> None:
        with self._lock:
            self._followers.remove(follower)


told = Relays()
"""By the scheduler, to this process; whenever its storage is attached."""


def parse_relay(text: str) -> Helper:
    """`NAME=tcp://HOST:PORT`.  Raises ValueError."""
    name, equals, endpoint = text.partition("=")
    if not name or not equals:
        raise ValueError(f"relay {text!r} is not NAME=tcp://HOST:PORT")
    check_endpoint(endpoint)
    return Helper(name, endpoint)
