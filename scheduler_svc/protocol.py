"""Wire models between the scheduler and its peers (engine ranks, routers, tools).

One ZeroMQ frame holds one JSON object whose `type` names the model.  Peers use a DEALER
socket, the scheduler a ROUTER socket, so the scheduler can push a `Plan` to an engine at
any time.  The life of one request:

    router  -> Place          scheduler -> Placement          (only routers that place)
    PE rank -> Report         scheduler -> Plan, to every rank of PE and DE that reported
    DE rank -> Report
    both    -> Done                                           (no answer)

Page positions are absolute: page `i` holds tokens `[i*page_size, (i+1)*page_size)` of the
prompt.  Ranges are half open.  DESIGN terms: `local_pages` is L_P or L_D, `hit_pages` is K,
`split_page` is x.

What arrives is checked when it is decoded: types, bounds, unknown fields.  What is built here is
not, so that a message costs no more than its tuple would; fields left at their defaults do not
travel.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

MAX_MESSAGE_BYTES = 256 * 1024
"""A longer frame is answered with an error; one several times as long the socket drops together
with its connection (`ZMQ_MAXMSGSIZE`)."""

PLAN_TIMEOUT_S = 3.0
"""An engine that has no plan this long after its report goes on with the prefill path."""

Name = Annotated[str, Meta(min_length=1, max_length=256)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Room = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Rank = Annotated[int, Meta(ge=0, lt=4096)]
Seconds = Annotated[float, Meta(ge=0)]


class Role(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


class Path(StrEnum):
    """Where the PE gets the pages it misses."""

    NONE = "none"
    """Nothing to load: no stored page beyond what the PE holds."""
    PREFILL = "prefill"
    """Every page read from storage is read by the PE."""
    DECODE = "decode"
    """Every page read from storage is read by the DE and forwarded."""
    SPLIT = "split"
    """Both read a part."""


class Outcome(StrEnum):
    OK = "ok"
    FALLBACK = "fallback"
    """The request went on, but not as planned; `fallback_reason` says why."""
    ABORTED = "aborted"


class Wire(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """Base of everything that travels.  Holds no reference cycles, so the collector need not look."""


class Engine(Wire, kw_only=True):
    """One rank of one engine, as it describes itself."""

    engine_id: Name
    role: Role
    rank: Rank = 0
    tp_size: Annotated[int, Meta(ge=1, le=4096)] = 1
    dp_rank: Rank | None = None
    """Of a server with data parallelism, each DP rank is an engine with a name of its own (`engine_names`)."""
    dp_size: Annotated[int, Meta(ge=1, le=4096)] = 1
    url: Name
    """HTTP address of the SGLang server, e.g. `http://127.0.0.1:30000`."""
    bootstrap_port: Annotated[int, Meta(ge=1, le=65535)] | None = None
    page_endpoint: Name | None = None
    """ZeroMQ address of this DE rank's page server; None on a PE."""
    fingerprint: Name
    """Names model, dtype, layers, heads, page size and layout; pages move only between equals."""
    page_size: Annotated[int, Meta(ge=1, le=2**20)]
    """Tokens in a page."""
    page_bytes: Annotated[int, Meta(ge=1, le=2**40)]
    """Bytes of one page on this rank, all layers, K and V."""


class Load(Wire):
    """What an engine rank has to do right now (paper section 6: seq_e, tok_e, read_q)."""

    sequences: Count = 0
    """Requests this rank was given and has not finished: on a PE until their KV is sent, on a DE until
    their last token."""
    tokens: Count = 0
    """Tokens of their whole prompts; what a DE has generated does not count."""
    read_queue_bytes: Count = 0
    """Bytes planned to be read from storage by this rank and not yet read."""
    read_rate_bytes_per_s: Annotated[float, Meta(ge=0)] = 0.0
    """Measured drain rate of the storage lane; 0 while unknown."""
    host_free_pages: Count = 0
    device_free_tokens: Count = 0
    """Tokens of KV the device has room for, beyond those of every request it was given; an engine that
    never says more than 0 is not judged by it."""
    unplanned_read_bytes: Count = 0
    """Read from storage outside any plan since the rank started (late retries of SGLang)."""
    held: Count = 0
    """Requests, pinned rooms and restore promises that the rank has not let go of; 0 when idle."""
    pool_checks: Count = 0
    """Times since the rank's start that its pools were checked, empty, before a flush."""
    kept_pages: Count = 0
    """Pages that those checks found pinned or lost (must stay 0)."""


class Heartbeat(Wire, tag="heartbeat"):
    """Sent every second and on connect; registers the engine and refreshes its load."""

    engine: Engine
    load: Load = Load()


class Place(Wire, tag="place", kw_only=True):
    """A router asks for a pair of engines."""

    request_id: Name
    session_id: Name | None = None
    prompt_tokens: Count
    traceparent: Annotated[str, Meta(max_length=128)] | None = None


class Placement(Wire, tag="placement"):
    request_id: Name
    room: Room
    prefill: Engine
    decode: Engine


class Report(Wire, tag="report", kw_only=True):
    """An engine rank has matched a request against its own caches."""

    room: Room
    engine_id: Name
    role: Role
    rank: Rank = 0
    prompt_tokens: Count
    local_pages: Count
    """L_P (PE) or L_D (DE): pages held from the start of the prompt without a gap."""
    hit_pages: Count | None = None
    """K, only from a PE: stored prefix in pages, at least `local_pages`."""
    traceparent: Annotated[str, Meta(max_length=128)] | None = None

    def __post_init__(self) -> None:
        if (self.role is Role.PREFILL) != (self.hit_pages is not None):
            raise ValueError("hit_pages must be given by a prefill engine and only by it")
        if self.hit_pages is not None and self.hit_pages < self.local_pages:
            raise ValueError(f"hit_pages {self.hit_pages} is less than local_pages {self.local_pages}")


class Plan(Wire, tag="plan", kw_only=True):
    """The one plan of a room: PE gets `[L_P, split_page)` from the DE, `[split_page, K)` from the store."""

    room: Room
    path: Path
    prefill_id: Name
    decode_id: Name
    prefill_local_pages: Count
    decode_local_pages: Count
    hit_pages: Count
    split_page: Count
    """x.  The DE reads `[L_D, x)` from the store; x <= L_D means it reads nothing.  Policies keep
    x at or above `min(L_D, K)`; x = 0 below that means that nothing may be forwarded, not even
    what the DE holds (layouts differ, page servers are missing or the plan came too late)."""
    decode_endpoints: tuple[Name, ...] = ()
    """Page server of every DE rank, in rank order."""
    policy: Name


class LaneRecord(Wire):
    """What one lane did for one request."""

    lane: Literal["store", "peer"]
    first_page: Count
    end_page: Count
    """Pages `[first_page, end_page)` arrived whole through this lane."""
    bytes: Count
    queue_s: Seconds
    """From being handed to the lane until its first transfer began."""
    busy_s: Seconds
    """From the first transfer's begin to the last one's end."""

    def __post_init__(self) -> None:
        if self.end_page < self.first_page:
            raise ValueError(f"end_page {self.end_page} is before first_page {self.first_page}")


class Done(Wire, tag="done", kw_only=True):
    """A rank has finished its part of a room; closes the room when both sides said so."""

    room: Room
    engine_id: Name
    role: Role
    rank: Rank = 0
    outcome: Outcome
    fallback_reason: Annotated[str, Meta(max_length=256)] | None = None
    loaded_pages: Count = 0
    """Pages added to the rank's host pool for this request."""
    lanes: tuple[LaneRecord, ...] = ()


class Ping(Wire, tag="ping"):
    """Whether the scheduler answers; costs it nothing and changes nothing."""


class Pong(Wire, tag="pong"):
    """It does."""


class StatusRequest(Wire, tag="status_request"):
    """A tool asks for everything at once."""


class EngineStatus(Wire):
    engine: Engine
    load: Load
    age_s: Seconds
    """Since the last heartbeat."""
    store_read_bytes: Count = 0
    """Planned and unplanned."""
    forwarded_bytes: Count = 0
    """Read out of a peer's host pool (counted on the PE)."""
    loaded_pages: Count = 0


class Status(Wire, tag="status"):
    policy: Name
    uptime_s: Seconds
    engines: tuple[EngineStatus, ...]
    rooms_open: Count
    rooms_closed: Count
    paths: dict[Path, Count]
    """Rooms per planned path."""
    fallbacks: dict[str, Count]
    """Rooms per fallback reason."""
    duplicate_store_pages: Count
    """Pages of one room that both engines read from the store (must stay 0)."""
    errors: Count
    """Messages answered with an error."""


class ErrorCode(StrEnum):
    MALFORMED = "malformed"
    """Not a known message, or a field is wrong."""
    CONFLICT = "conflict"
    """Contradicts what was already decided for the room or said by the engine."""
    UNKNOWN_ENGINE = "unknown_engine"
    """The engine has sent no heartbeat (or it expired): heartbeat, then repeat."""
    NO_ENGINE = "no_engine"
    """No live engine of the wanted role."""
    FORBIDDEN = "forbidden"
    """The peer's key does not speak for this engine, or is not authorized any more."""
    INTERNAL = "internal"
    """A fault in the scheduler while it handled this message; the message changed nothing."""


class Error(Wire, tag="error"):
    code: ErrorCode
    message: str
    """Names the field, the value and the remedy."""
    room: Room | None = None
    request_id: str | None = None


Request = Heartbeat | Place | Report | Done | StatusRequest | Ping
Reply = Placement | Plan | Status | Pong | Error

_request = msgspec.json.Decoder(Request)
_reply = msgspec.json.Decoder(Reply)
_encoder = msgspec.json.Encoder()

encode = _encoder.encode
"""`Wire -> bytes`: the frame of a message."""


def decode_request(frame: bytes) -> Request:
    """Parse what a peer sent.  Raises ValueError naming field, value and problem."""
    return decode(_request, frame, MAX_MESSAGE_BYTES)


def decode_reply(frame: bytes) -> Reply:
    """Parse what the scheduler sent.  Raises ValueError naming field, value and problem."""
    return decode(_reply, frame, MAX_MESSAGE_BYTES)


def decode(decoder: msgspec.json.Decoder, frame: bytes, most_bytes: int) -> Any:
    """Parse a frame of at most `most_bytes`.  Raises ValueError naming field, value and problem."""
    if len(frame) > most_bytes:
        raise ValueError(f"message of {len(frame)} bytes exceeds {most_bytes}")
    try:
        return decoder.decode(frame)
    except msgspec.ValidationError as error:
        raise ValueError(_explained(str(error), frame)) from None
    except (ValueError, RecursionError) as error:  # not JSON, or thousands of open brackets
        raise ValueError(f"message: {error}, got {frame[:120]!r}") from None


def _explained(problem: str, frame: bytes) -> str:
    """msgspec says "PROBLEM - at `$.field[0]`"; people also want to read what stands there."""
    text, _, path = problem.partition(" - at `$")
    path = path.strip(".`")
    try:
        value = msgspec.json.decode(frame)
        for key, index in re.findall(r"(\w+)|\[(\d+)\]", path):
            value = value[int(index)] if index else value[key]
        got = str(value)[:120]
    except (ValueError, LookupError, TypeError, RecursionError):  # what follows is no JSON, or no such place
        got = frame[:120]
    return f"{path or 'message'}: {text}, got {got!r}"
