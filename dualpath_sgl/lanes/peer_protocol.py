"""Wire models between a PE rank's peer lane and a DE rank's page server.

    PE -> Pull            "send me word of pages [first_page, end_page) of this room"
    DE -> Pages, ...      where the next pages lie, as soon as they are whole and pinned
    DE -> Waiting         still loading; the lane need not give up
    DE -> Ended           no page from `end_page` on will come
    PE -> Reading         "I am on my way through what you offered; keep it"
    PE -> Release         "I have read what I need"
    DE -> Released        `valid` tells whether the pages were pinned all that time

A page that was read counts only after `Released(valid=True)`: pages stay pinned until the DE
handles the release, so everything read before it was read from pinned memory.

Releases of DualPath work together as long as their `VERSION` is the same: a field that one side
does not know is ignored.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from scheduler_svc.wire.protocol import Count, Name, Room, Wire, decode

VERSION = 1
"""Raised when a release cannot talk to the one before."""
MAX_MESSAGE_BYTES = 8 * 1024 * 1024
MOST_POINTERS = 4096
"""In one Pages message, or those of one page: some 100 KB, whatever a DE offers."""
Pointer = Annotated[int, Meta(ge=0, le=2**63 - 1)]
"""An address in user space."""


class Pull(Wire, frozen=True, tag="pull"):
    room: Room
    first_page: Count
    end_page: Count
    fingerprint: Name
    prompt_hash: Annotated[str, Meta(max_length=256)] | None = None
    """Names the prompt that the PE means by this room; None where it does not say."""
    version: Count = 1
    """Absent is the first one."""


class Reading(Wire, frozen=True, tag="reading"):
    room: Room


class Release(Wire, frozen=True, tag="release"):
    room: Room


class Pages(Wire, frozen=True, tag="pages"):
    """Consecutive pages; page `first_page + i` is made of `len(sizes)` blocks."""

    room: Room
    mooncake_address: Name = msgspec.field(name="session")
    """Where the DE's memory is read: `host:port` of its transfer engine, which Mooncake calls a session."""
    first_page: Count
    pointers: tuple[Pointer, ...]
    """Addresses in the DE's memory, page by page, `len(sizes)` for each."""
    sizes: tuple[Annotated[int, Meta(ge=1)], ...]
    """Bytes of each block of one page."""


class Waiting(Wire, frozen=True, tag="waiting"):
    room: Room


class Ended(Wire, frozen=True, tag="ended"):
    room: Room
    end_page: Count
    reason: Annotated[str, Meta(max_length=256)] | None = None
    """None when every asked page was offered."""


class Released(Wire, frozen=True, tag="released"):
    room: Room
    valid: bool


ToServer = Pull | Reading | Release
ToLane = Pages | Waiting | Ended | Released

_to_server = msgspec.json.Decoder(ToServer)
_to_lane = msgspec.json.Decoder(ToLane)


def decode_to_server(frame: bytes) -> ToServer:
    """Parse what a PE sent.  Raises ValueError naming field, value and problem."""
    return decode(_to_server, frame, MAX_MESSAGE_BYTES)


def decode_to_lane(frame: bytes) -> ToLane:
    """Parse what a DE sent.  Raises ValueError naming field, value and problem."""
    return decode(_to_lane, frame, MAX_MESSAGE_BYTES)
