"""Wire models between a prefill engine rank (the client) and a relay, or a decode engine that holds objects.

    client -> Hello       who I am, which versions I speak
    relay -> Welcome      what I take at a time; or Rejected, and why
    client -> Fetch       "read these objects", under a number of the client's, the lease
    relay -> Alive        now and then while something is asked for or leased
    relay -> Ready        where the objects lie, and how many bytes each has; the lease runs from here
    relay -> Refused      nothing will come of this lease
    client -> Revoke      "drop it if you have not begun"; Refused is the answer, or Ready
    client -> Release     "I have pulled what I need"; also of a lease that was given up
    relay -> Released     `valid`: the objects lay there all that time
    relay -> Leaving      ask for nothing more, the relay is about to stop
    client -> Holds       "which of these do you hold?"; Held is the answer

A decode engine is a relay that reads nothing: its `Ready` comes at once, and says `NOT_HELD` of objects that do
not lie in its host memory.  A relay holds nothing by itself.

One ZeroMQ frame holds one JSON object whose `type` names the model.  The client has a DEALER socket, the
relay a ROUTER; a connection is a client, so that what one has asked for ends with its connection.

What was pulled counts only after `Released(valid=True)`: memory of the ring is given to other objects
after a lease is over and never before, and a decode engine says `valid` only if none of these pages was given
back meanwhile.  So whatever a client has read before that answer are the bytes of the keys that it asked for,
however late it was.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta

from scheduler_svc.wire.protocol import (
    Count,
    Name,
    Rank,
    Seconds,
    Text,
    Traceparent,
    Version,
    Wire,
    common_version,
    decode,
)

VERSION = 1
"""The newest that is spoken here; raised when something gets another meaning."""
OLDEST_VERSION = 1

MAX_MESSAGE_BYTES = 512 * 1024
MOST_OBJECTS = 1024
"""Of one Fetch."""
MOST_KEY_CHARACTERS = 512
"""Longer keys are the own client's."""
MOST_KEYS_CHARACTERS = 256 * 1024
"""Of all keys of one Fetch."""
MAX_OBJECT_BYTES = 2**40
MOST_ASKED = 256
"""Keys of one Holds: a decode engine answers between two of its steps."""
NOT_HELD = -(2**20)
"""As a result: it does not lie here.  That says nothing of the store."""

Lease = Annotated[int, Meta(ge=1, le=2**63 - 1)]
Position = Annotated[int, Meta(ge=0, le=MOST_ASKED)]
Question = Annotated[int, Meta(ge=1, le=2**63 - 1)]
Key = Annotated[str, Meta(min_length=1, max_length=MOST_KEY_CHARACTERS)]
Address = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Got = Annotated[int, Meta(ge=-(2**31), le=MAX_OBJECT_BYTES)]


class Hello(Wire, frozen=True, tag="hello", kw_only=True):
    engine: Name
    """Whose load it is: relays are fair between engines, not between their ranks."""
    rank: Rank = 0
    version: Version = VERSION
    oldest_version: Version = OLDEST_VERSION


class Fetch(Wire, frozen=True, tag="fetch", kw_only=True):
    lease: Lease
    """Not used by this client before."""
    keys: Annotated[tuple[Key, ...], Meta(min_length=1, max_length=MOST_OBJECTS)]
    sizes: Annotated[
        tuple[Annotated[int, Meta(ge=1, le=MAX_OBJECT_BYTES)], ...], Meta(max_length=MOST_OBJECTS)
    ]
    """Bytes of each object.  One of another size is not the object that is meant."""
    left_bytes: Count = 0
    """Of the same load, not asked of anybody yet: whose need is greatest."""
    traceparent: Traceparent | None = None

    def __post_init__(self) -> None:
        if len(self.keys) != len(self.sizes):
            raise ValueError(f"{len(self.keys)} keys and {len(self.sizes)} sizes")


class Revoke(Wire, frozen=True, tag="revoke"):
    lease: Lease


class Release(Wire, frozen=True, tag="release"):
    lease: Lease


class Holds(Wire, frozen=True, tag="holds"):
    question: Question
    keys: Annotated[tuple[Key, ...], Meta(min_length=1, max_length=MOST_ASKED)]


class Welcome(Wire, frozen=True, tag="welcome", kw_only=True):
    version: Version
    """The newest that both speak."""
    mooncake_address: Name
    """Mooncake's name of the memory that Ready will speak of."""
    address: Address
    """Of a byte in it, which a client may read at any time to find out whether it can."""
    lease_s: Seconds
    most_bytes: Count
    """Of one Fetch."""
    most_fetches: Count
    """Asked for and not released."""
    ahead: Annotated[int, Meta(ge=1, le=64)]
    """Fetches to be asked for and not ready, so that the relay's link does not wait for messages and its queue
    has a choice between engines."""


class Rejected(Wire, frozen=True, tag="rejected"):
    reason: Text


class Ready(Wire, frozen=True, tag="ready", kw_only=True):
    lease: Lease
    mooncake_address: Name
    addresses: Annotated[tuple[Address, ...], Meta(max_length=MOST_OBJECTS)]
    got: Annotated[tuple[Got, ...], Meta(max_length=MOST_OBJECTS)]
    """Bytes of each object in the order asked, `NOT_HELD`, or Mooncake's negative code."""

    def __post_init__(self) -> None:
        if len(self.addresses) != len(self.got):
            raise ValueError(f"{len(self.addresses)} addresses and {len(self.got)} results")


class Reason(StrEnum):
    UNKNOWN = "unknown"
    """No Hello on this connection."""
    REVOKED = "revoked"
    LEAVING = "leaving"
    BUSY = "busy"
    """More is asked for than the relay queues."""
    TOO_LARGE = "too_large"
    """More bytes than Welcome allows."""
    IN_USE = "in_use"
    """The client has a lease of this number."""
    STORE_HANGS = "store_hangs"
    FAULT = "fault"
    """In the relay's own code; its log says which."""


class Refused(Wire, frozen=True, tag="refused"):
    lease: Lease
    reason: Reason


class Released(Wire, frozen=True, tag="released"):
    lease: Lease
    valid: bool


class Alive(Wire, frozen=True, tag="alive"):
    pass


class Leaving(Wire, frozen=True, tag="leaving"):
    pass


class Held(Wire, frozen=True, tag="held"):
    question: Question
    runs: Annotated[tuple[tuple[Position, Position], ...], Meta(max_length=MOST_ASKED)]
    """First key and number of keys of each run that is held."""


ToRelay = Hello | Fetch | Revoke | Release | Holds
ToClient = Welcome | Rejected | Ready | Refused | Released | Alive | Leaving | Held

_to_relay = msgspec.json.Decoder(ToRelay)
_to_client = msgspec.json.Decoder(ToClient)


def disagreement(hello: Hello) -> str | None:
    """Why a client cannot be spoken with; None when it can, in the newest version that both know."""
    if common_version(hello.version, hello.oldest_version, (VERSION, OLDEST_VERSION)) is not None:
        return None
    return (
        f"relay protocol {hello.oldest_version} to {hello.version}, this side speaks {OLDEST_VERSION} to "
        f"{VERSION}: give both the same release"
    )


def decode_to_relay(frame: bytes) -> ToRelay:
    """Parse what a client sent.  Raises ValueError naming field, value and problem."""
    message: ToRelay = decode(_to_relay, frame, MAX_MESSAGE_BYTES)
    return message


def decode_to_client(frame: bytes) -> ToClient:
    """Parse what a relay sent.  Raises ValueError naming field, value and problem."""
    message: ToClient = decode(_to_client, frame, MAX_MESSAGE_BYTES)
    return message
