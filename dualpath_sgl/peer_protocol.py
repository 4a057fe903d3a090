"""Wire models between a PE rank's peer lane and a DE rank's page server.

    PE -> Pull            "send me word of pages [first_page, end_page) of this room"
    DE -> Pages, ...      where the next pages lie, as soon as they are whole and pinned
    DE -> Waiting         still loading; the lane need not give up
    DE -> Ended           no page from `end_page` on will come
    PE -> Release         "I have read what I need"
    DE -> Released        `valid` tells whether the pages were pinned all that time

A page that was read counts only after `Released(valid=True)`: pages stay pinned until the DE
handles the release, so everything read before it was read from pinned memory.
"""

from __future__ import annotations

from typing import Annotated, Literal, Union

from pydantic import Field, TypeAdapter

from scheduler_svc.protocol import Count, Name, Room, Wire

MAX_MESSAGE_BYTES = 8 * 1024 * 1024
Pointer = Annotated[int, Field(ge=0, lt=2**64)]


class Pull(Wire):
    type: Literal["pull"] = "pull"
    room: Room
    first_page: Count
    end_page: Count
    fingerprint: Name


class Release(Wire):
    type: Literal["release"] = "release"
    room: Room


class Pages(Wire):
    """Consecutive pages; page `first_page + i` is made of `len(sizes)` blocks."""

    type: Literal["pages"] = "pages"
    room: Room
    session: Name
    first_page: Count
    pointers: tuple[Pointer, ...]
    """Addresses in the DE's memory, page by page, `len(sizes)` for each."""
    sizes: tuple[Annotated[int, Field(gt=0)], ...]
    """Bytes of each block of one page."""


class Waiting(Wire):
    type: Literal["waiting"] = "waiting"
    room: Room


class Ended(Wire):
    type: Literal["ended"] = "ended"
    room: Room
    end_page: Count
    reason: Annotated[str, Field(max_length=256)] | None = None
    """None when every asked page was offered."""


class Released(Wire):
    type: Literal["released"] = "released"
    room: Room
    valid: bool


ToServer = TypeAdapter(Annotated[Union[Pull, Release], Field(discriminator="type")])
ToLane = TypeAdapter(Annotated[Union[Pages, Waiting, Ended, Released], Field(discriminator="type")])
