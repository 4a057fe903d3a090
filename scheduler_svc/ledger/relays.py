"""Relays the scheduler knows, each as its last heartbeat described it.

    unknown ── heartbeat ──> serving ── says that it drains ──> draining
                                └──────── `RELAY_EXPIRY_S` of silence, from either ──> forgotten

Who drains is on no list any more, but known until its heartbeats stop.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass
from itertools import islice

from scheduler_svc.wire.protocol import RelayInfo, RelayLoad, RelayStatus

RELAY_EXPIRY_S = 5.0
"""Five missed heartbeats.  Engines notice sooner that a relay is gone: they are connected to it."""

MAX_RELAYS = 4096
CANDIDATES = 64
"""Relays looked at when one has to make room: those that heartbeat longest ago."""
STATUS_RELAYS = 96
"""In one page of a status.  However long their names are, it fits into a message (a test sees to it)."""


class RelayConflict(ValueError):
    """There is no room for one more."""


@dataclass(slots=True)
class RelayState:
    info: RelayInfo
    load: RelayLoad
    heartbeat_s: float
    serial: int
    """Grows from relay to relay."""
    sender: bytes
    """Who heartbeats for it: a key, or a connection."""


class RelayTable:
    """Every live relay.  `expire` must be called before any question that depends on the time."""

    def __init__(self, expiry_s: float = RELAY_EXPIRY_S, max_relays: int = MAX_RELAYS) -> None:
        self._expiry_s = expiry_s
        self._max_relays = max_relays
        self._live: dict[str, RelayState] = {}
        """In the order of their serial numbers."""
        self._by_age: OrderedDict[str, RelayState] = OrderedDict()
        """Oldest heartbeat first."""
        self._held: Counter[bytes] = Counter()
        """Relays by sender."""
        self._serial = 0
        self._gone: list[str] = []
        """Since `expire` said it last."""
        self.changes = 0
        """Grows whenever another list of those that serve is due."""

    def __len__(self) -> int:
        return len(self._live)

    def heartbeat(self, info: RelayInfo, load: RelayLoad, now_s: float, sender: bytes = b"") -> None:
        """Register or refresh one relay.  Raises RelayConflict and changes nothing."""
        relay = self._live.get(info.name)
        if relay is None:
            self._make_room(info.name, sender)
            self._serial += 1
            relay = self._live[info.name] = RelayState(info, load, now_s, self._serial, sender)
            self._held[sender] += 1
            self.changes += 1
        elif relay.info.endpoint != info.endpoint or relay.load.draining != load.draining:
            self.changes += 1
        if relay.sender != sender:
            self._held[sender] += 1
            self._let_go(relay.sender)
            relay.sender = sender
        relay.info, relay.load, relay.heartbeat_s = info, load, now_s
        self._by_age[info.name] = relay
        self._by_age.move_to_end(info.name)

    def expire(self, now_s: float) -> list[str]:
        """Forget those without a recent heartbeat; returns all that went since the last call."""
        while self._by_age:
            name, relay = next(iter(self._by_age.items()))
            if now_s - relay.heartbeat_s <= self._expiry_s:
                break
            self._forget(name)
        gone, self._gone = self._gone, []
        return gone

    def serving(self) -> list[RelayInfo]:
        """Those that may be asked, in the order in which they came."""
        return [relay.info for relay in self._live.values() if not relay.load.draining]

    def get(self, name: str) -> RelayState | None:
        return self._live.get(name)

    def status(self, now_s: float, after: int) -> tuple[tuple[RelayStatus, ...], int | None]:
        """A page of those with serial numbers above `after`, and what the next page comes after."""
        page = list(islice((one for one in self._live.values() if one.serial > after), STATUS_RELAYS))
        rows = tuple(RelayStatus(one.info, one.load, max(0.0, now_s - one.heartbeat_s)) for one in page)
        is_last = not page or page[-1] is self._live[next(reversed(self._live))]
        return rows, None if is_last else page[-1].serial

    def _make_room(self, name: str, sender: bytes) -> None:
        """As for engines: whoever speaks for most relays pays.  Raises RelayConflict."""
        if len(self._live) < self._max_relays:
            return
        oldest = islice(self._by_age.items(), CANDIDATES)
        other, relay = max(oldest, key=lambda item: self._held[item[1].sender])
        if self._held[relay.sender] <= self._held[sender] + 1:
            raise RelayConflict(
                f"{len(self._live)} relays are registered already; use another scheduler for relay {name}"
            )
        self._forget(other)

    def _forget(self, name: str) -> None:
        relay = self._by_age.pop(name)
        del self._live[name]
        self._let_go(relay.sender)
        self._gone.append(name)
        self.changes += 1

    def _let_go(self, sender: bytes) -> None:
        self._held[sender] -= 1
        if not self._held[sender]:
            del self._held[sender]
