"""Wire models between the scheduler and its peers (engine ranks, routers, tools).

One ZeroMQ frame holds one JSON object whose `type` names the model.  Peers use a DEALER
socket, the scheduler a ROUTER socket, so the scheduler can push a `Plan` to an engine at
any time.  The life of one request:

    router  -> Place          scheduler -> Placement          (only routers that place)
    PE rank -> Report         scheduler -> Plan, to every rank of PE and DE that reported
    DE rank -> Report
    both    -> Done                                           (no answer)
                              scheduler -> Loaded, to those whose Report or Place asked for it

Relays say in a `RelayHeartbeat` what they have to do, decode engine ranks in their heartbeats where they give
away what they hold.  Prefill engine ranks that can use them are told in `Helpers` which of both may help: on
connecting, and whenever that changes.

Before that each rank has said which versions it speaks, in a `Heartbeat` that asks for an answer:
`Accepted`, or an `Error` that says why not and what to do.  A rank without `Accepted` on its present
connection gets no plans and waits for none.

Page positions are absolute: page `i` holds tokens `[i*page_size, (i+1)*page_size)` of the
prompt.  Ranges are half open.  DESIGN terms: `local_pages` is L_P or L_D, `hit_pages` is K,
`split_page` is x.

What arrives is checked when it is decoded: types, bounds, characters, addresses.  Fields that are not
known are ignored, so that a newer peer may say more.  What is built here is not checked (but for
`__post_init__`), so that a message costs no more than its tuple would; fields left at their defaults do
not travel.

Sums of bounded fields are cut to the same bounds before they travel (`MAX_COUNT`, `MAX_RATE`).
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from scheduler_svc.wire.addresses import check_endpoint, check_http_url

PROTOCOL_VERSION = 2
"""What is said here.  To be raised when something gets another meaning; a new optional field needs none."""
OLDEST_VERSION = 1
"""Oldest that this scheduler understands.  1: peers from before versions; they say none and are not told
that they were accepted."""
OLDEST_PEER_VERSION = 2
"""Oldest with which an engine of this release exchanges pages."""

MAX_MESSAGE_BYTES = 256 * 1024
"""A longer frame is answered with an error; one several times as long the socket drops together
with its connection (`ZMQ_MAXMSGSIZE`)."""

PLAN_TIMEOUT_S = 3.0
"""An engine that has no plan this long after its report goes on with the prefill path."""

HEARTBEAT_S = 1.0
"""Between the heartbeats of a peer with which nothing happens."""
FRESH_S = 0.05
"""Between the heartbeats of an engine rank that requests leave: placement draws on no older load."""

MAX_COUNT = 2**53
MAX_RATE = 1e15
"""Bytes per second."""
MAX_RANKS = 1024
"""Most ranks of one engine: their page servers fit into one message."""
LEADER_RANK = 0
"""It speaks for its engine's compute (paper section 6: only the leader talks)."""
MAX_LANES = 16
"""Records of one load; three are usual."""
MAX_HELPERS = 64
"""Relays in one list, and as many ranks of decode engines."""

TRACEPARENT = r"^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]*)?\Z"
"""W3C Trace Context; later versions may append."""
_IN_WORDS = {TRACEPARENT: "is not a W3C traceparent"}

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What ends a line of a log, moves a terminal's cursor or turns the text around: in no text that travels."""

Name = Annotated[str, Meta(min_length=1, max_length=256)]
Text = Annotated[str, Meta(max_length=256)]
Endpoint = Annotated[str, Meta(min_length=1, max_length=200)]
Traceparent = Annotated[str, Meta(max_length=128, pattern=TRACEPARENT)]
Digest = Annotated[str, Meta(min_length=1, max_length=64)]
Count = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
Room = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Rank = Annotated[int, Meta(ge=0, lt=MAX_RANKS)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Version = Annotated[int, Meta(ge=1, le=2**31 - 1)]


class Role(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


class Mode(StrEnum):
    """How an engine's loads use more than one storage link."""

    DECODE_SIDE = "decode-side"
    """The DE of a room reads a part into its own host pool, by a plan."""
    RELAY = "relay"
    """The PE reads, and relays help it.  A room with such an engine forwards nothing."""


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


class Wire(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Base of everything that travels.  Holds no reference cycles, so the collector need not look."""


class RankInfo(Wire, frozen=True, kw_only=True):
    """One rank of one engine, as it describes itself; on the wire, fields called `engine`, `prefill`, `decode`."""

    engine_id: Name
    role: Role
    rank: Rank = 0
    tp_size: Annotated[int, Meta(ge=1, le=MAX_RANKS)] = 1
    dp_rank: Rank | None = None
    """A DP rank of a server with several is an engine with a name of its own (`engine_names`)."""
    dp_size: Annotated[int, Meta(ge=1, le=MAX_RANKS)] = 1
    url: Name
    """HTTP address of the SGLang server, e.g. `http://127.0.0.1:30000`.  Rank 0's is the engine's: ranks on
    other hosts may give another."""
    bootstrap_port: Annotated[int, Meta(ge=1, le=65535)] | None = None
    page_endpoint: Endpoint | None = None
    """ZeroMQ address of this DE rank's page server; None on a PE."""
    fingerprint: Name
    """Names model, dtype, layers, heads, page size and layout; pages move only between equals.  May change
    while the rank lives (new weights): plans compare what the last heartbeats said."""
    page_size: Annotated[int, Meta(ge=1, le=2**20)]
    """Tokens in a page."""
    page_bytes: Annotated[int, Meta(ge=1, le=2**40)]
    """Bytes of one page on this rank, all layers, K and V."""
    mode: Mode = Mode.DECODE_SIDE
    helped: bool = False
    """Relays may help this PE rank, as they may in mode relay."""
    objects: Digest | None = None
    """Names how this rank calls its objects in the store, and their sizes: a PE rank takes objects by key from
    DE ranks that say the same.  None: it takes and gives none."""
    fetch_endpoint: Endpoint | None = None
    """ZeroMQ address where this DE rank gives away, by key, what lies in its host memory."""

    def __post_init__(self) -> None:
        check_http_url(self.url)
        if self.page_endpoint is not None:
            check_endpoint(self.page_endpoint)
        if self.fetch_endpoint is not None:
            check_endpoint(self.fetch_endpoint)


class Workload(Wire, frozen=True):
    """What an engine rank has to do right now (paper section 6: seq_e, tok_e, read_q); on the wire, `load`."""

    sequences: Count = 0
    """Requests this rank was given and has not finished: on a PE until their KV is sent, on a DE until
    their last token."""
    tokens: Count = 0
    """Tokens of their whole prompts; what a DE has generated does not count."""
    read_queue_bytes: Count = 0
    """Bytes planned to be read from storage by this rank and not yet read."""
    read_rate_bytes_per_s: Annotated[float, Meta(ge=0, le=MAX_RATE)] = 0.0
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
    faults: Count = 0
    """Exceptions in the rank's DualPath code since it started, each of them in its log."""
    ready_tokens: Count = 0
    """To be computed by a PE, of requests that wait for their turn and for no storage read."""
    compute_rate_tokens_per_s: Annotated[float, Meta(ge=0, le=MAX_RATE)] = 0.0
    """Tokens that a PE computes in a second in which it computes; 0 while unknown."""


class Heartbeat(Wire, frozen=True, tag="heartbeat"):
    """Sent every `HEARTBEAT_S`, on connect, and within `FRESH_S` when a request has left the leader rank;
    registers the engine and refreshes its load."""

    engine: RankInfo
    load: Workload = Workload()
    version: Version = 1
    """The newest protocol version that the rank speaks."""
    oldest_version: Version = 1
    """The oldest one; with another engine it exchanges pages only if their ranges meet."""
    hello: bool = False
    """Asks for an answer, until `Accepted` has come on this connection."""


class RelayInfo(Wire, frozen=True, kw_only=True):
    """A relay, as it describes itself."""

    name: Name
    """With CURVE its public key is `NAME.key`."""
    endpoint: Endpoint
    """ZeroMQ address that prefill engines ask."""
    ring_bytes: Count = 0

    def __post_init__(self) -> None:
        check_endpoint(self.endpoint)


class RelayLoad(Wire, frozen=True):
    """What a relay has to do right now."""

    queue_bytes: Count = 0
    """Asked for and not read yet."""
    read_rate_bytes_per_s: Annotated[float, Meta(ge=0, le=MAX_RATE)] = 0.0
    """Measured while it reads; 0 while unknown."""
    ring_free_bytes: Count = 0
    clients: Count = 0
    """Engine ranks that may ask it."""
    read_bytes: Count = 0
    """Since it started."""
    draining: bool = False
    """It wants to be asked for nothing more."""
    faults: Count = 0
    """Exceptions in its own code since it started, each of them in its log."""


class RelayHeartbeat(Wire, frozen=True, tag="relay_heartbeat", kw_only=True):
    """Sent every second, on connect, and at once when it begins to drain."""

    relay: RelayInfo
    load: RelayLoad = RelayLoad()
    version: Version = 1
    oldest_version: Version = 1
    hello: bool = False
    """As in `Heartbeat`."""


class Helper(Wire, frozen=True):
    name: Name
    endpoint: Endpoint
    share: Annotated[float, Meta(ge=0, le=1)] = 1.0
    """Of what the relay may be asked ahead, this engine's part; 0: stay connected and ask for nothing."""

    def __post_init__(self) -> None:
        check_endpoint(self.endpoint)


class Resident(Wire, frozen=True):
    """A DE rank that gives away by key what lies in its host memory."""

    name: Name
    """The engine's."""
    endpoint: Endpoint
    rank: Rank = 0

    def __post_init__(self) -> None:
        check_endpoint(self.endpoint)


class Helpers(Wire, frozen=True, tag="helpers"):
    """To a prefill engine rank: these may help, and no others, until the next such message."""

    relays: Annotated[tuple[Helper, ...], Meta(max_length=MAX_HELPERS)] = ()
    reason: Text | None = None
    """Why no relay is to be asked for anything now, for people."""
    residents: Annotated[tuple[Resident, ...], Meta(max_length=MAX_HELPERS)] = ()


class Accepted(Wire, frozen=True, tag="accepted"):
    """The rank or relay is registered; the heartbeats after this one are not answered."""

    version: Version
    """The newest that both speak."""


class Place(Wire, frozen=True, tag="place", kw_only=True):
    """A router asks for a pair of engines."""

    request_id: Name
    session_id: Name | None = None
    prompt_tokens: Count
    traceparent: Traceparent | None = None
    version: Version = 1
    oldest_version: Version = 1
    """As in `Heartbeat`."""
    tell_loaded: bool = False
    """The router wants a `Loaded` when the room is done (for its trace)."""


class Placement(Wire, frozen=True, tag="placement"):
    request_id: Name
    room: Room
    prefill: RankInfo
    decode: RankInfo


class Report(Wire, frozen=True, tag="report", kw_only=True):
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
    traceparent: Traceparent | None = None
    tell_loaded: bool = False
    """The rank wants a `Loaded` when the room is done (for its trace)."""
    prompt_hash: Digest | None = None
    """Over the prompt's tokens and its cache namespace.  Where PE and DE give different ones, or different
    `prompt_tokens`, they mean different prompts and the plan forwards nothing."""

    def __post_init__(self) -> None:
        if (self.role is Role.PREFILL) != (self.hit_pages is not None):
            raise ValueError("hit_pages must be given by a prefill engine and only by it")
        if self.hit_pages is not None and self.hit_pages < self.local_pages:
            raise ValueError(f"hit_pages {self.hit_pages} is less than local_pages {self.local_pages}")


class Plan(Wire, frozen=True, tag="plan", kw_only=True):
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
    what the DE holds (layouts or prompts differ, page servers are missing or the plan came too late)."""
    decode_endpoints: Annotated[tuple[Endpoint, ...], Meta(max_length=MAX_RANKS)] = ()
    """Page server of every DE rank, in rank order."""
    policy: Name

    @property
    def shown_path(self) -> str:
        """For people: `resident` where the DE holds all that the PE needs, so that nobody reads the store."""
        if self.path is Path.PREFILL and self.split_page >= self.hit_pages:
            return "resident"
        return self.path.value

    def __post_init__(self) -> None:
        for endpoint in self.decode_endpoints:
            check_endpoint(endpoint)


class LaneRecord(Wire, frozen=True):
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


class Done(Wire, frozen=True, tag="done", kw_only=True):
    """A rank has finished its part of a room; closes the room when both sides said so."""

    room: Room
    engine_id: Name
    role: Role
    rank: Rank = 0
    outcome: Outcome
    fallback_reason: Text | None = None
    loaded_pages: Count = 0
    """Pages added to the rank's host pool for this request."""
    lanes: Annotated[tuple[LaneRecord, ...], Meta(max_length=MAX_LANES)] = ()


class Loaded(Wire, frozen=True, tag="loaded", kw_only=True):
    """To a rank or router that asked for it: what became of a room on all ranks of both sides."""

    room: Room
    path: Name | None = None
    """As people are told it (`Plan.shown_path`); None without a plan, like the next two."""
    split_page: Count | None = None
    hit_pages: Count | None = None
    prefill_read_bytes: Count = 0
    """From the store."""
    decode_read_bytes: Count = 0
    forwarded_bytes: Count = 0
    fallbacks: Annotated[tuple[Text, ...], Meta(max_length=MAX_RANKS)] = ()


class Ping(Wire, frozen=True, tag="ping"):
    """Whether the scheduler answers; costs it nothing and changes nothing."""


class Pong(Wire, frozen=True, tag="pong"):
    """It does."""


class StatusRequest(Wire, frozen=True, tag="status_request"):
    """A tool asks for one page of the engines, or of the relays, and all the rest."""

    after: Count = 0
    """`Status.next` of the page before."""
    relays: bool = False
    """The page is one of relays."""


class EngineStatus(Wire, frozen=True):
    engine: RankInfo
    load: Workload
    age_s: Seconds
    """Since the last heartbeat."""
    store_read_bytes: Count = 0
    """Planned and unplanned."""
    forwarded_bytes: Count = 0
    """Read out of a peer's host pool (counted on the PE)."""
    loaded_pages: Count = 0


class RelayStatus(Wire, frozen=True):
    relay: RelayInfo
    load: RelayLoad
    age_s: Seconds
    """Since the last heartbeat."""


class Status(Wire, frozen=True, tag="status"):
    policy: Name
    uptime_s: Seconds
    engines: tuple[EngineStatus, ...]
    """One page of them, in the order in which they came."""
    rooms_open: Count
    rooms_closed: Count
    paths: dict[Path, Count]
    """Rooms per planned path."""
    fallbacks: dict[Text, Count]
    """Rooms per fallback reason."""
    duplicate_store_pages: Count
    """Pages of one room that both engines read from the store (must stay 0)."""
    errors: Count
    """Messages answered with an error."""
    next: Count | None = None
    """There are more engines, or relays: ask for those after this one."""
    rooms_forgotten: Count = 0
    """Rooms that never ended, given up for their age or for want of room."""
    relays: tuple[RelayStatus, ...] = ()
    """One page of them, where relays were asked for."""
    relay_count: Count = 0
    """All that are known."""


class ErrorCode(StrEnum):
    MALFORMED = "malformed"
    """Not a known message, or a field is wrong."""
    CONFLICT = "conflict"
    """Contradicts what was already decided for the room, or said by the engine or relay."""
    UNKNOWN_ENGINE = "unknown_engine"
    """The engine has sent no heartbeat (or it expired): heartbeat, then repeat."""
    NO_ENGINE = "no_engine"
    """No live engine of the wanted role."""
    FORBIDDEN = "forbidden"
    """The peer's key does not speak for this engine or relay, or is not authorized any more."""
    VERSION = "version"
    """Both sides' protocol versions have none in common."""
    BUSY = "busy"
    """The scheduler has no time for this placement: the router places by itself."""
    INTERNAL = "internal"
    """A fault in the scheduler while it handled this message; the message changed nothing."""


class Error(Wire, frozen=True, tag="error"):
    code: ErrorCode
    message: Annotated[str, Meta(max_length=4096)]
    """Names the field, the value and the remedy."""
    room: Room | None = None
    """What it is about, if that was a report or a done; for such a report no plan comes."""
    request_id: Name | None = None
    """The same for a place.  An error about neither is about a heartbeat, or could not be told."""


Request = Heartbeat | RelayHeartbeat | Place | Report | Done | StatusRequest | Ping
Reply = Accepted | Placement | Plan | Loaded | Helpers | Status | Pong | Error
Message = TypeVar("Message")

_request: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
_reply: msgspec.json.Decoder[Reply] = msgspec.json.Decoder(Reply)
_encoder = msgspec.json.Encoder()

encode = _encoder.encode
"""`Wire -> bytes`: the frame of a message."""


class Malformed(ValueError):
    """A frame is no message; names field, value and problem."""

    def __init__(self, problem: str, frame: bytes) -> None:
        super().__init__(printable(problem))
        about = _as_json(frame)
        about = about if isinstance(about, dict) else {}
        room, request_id = about.get("room"), about.get("request_id")
        self.room = room if type(room) is int and 0 <= room < 2**63 else None
        """What the message is about, where that can be read all the same."""
        self.request_id = request_id if _is_name(request_id) else None
        """Likewise."""


def decode_request(frame: bytes) -> Request:
    """Parse what a peer sent.  Raises Malformed."""
    return decode(_request, frame, MAX_MESSAGE_BYTES)


def decode_reply(frame: bytes) -> Reply:
    """Parse what the scheduler sent.  Raises Malformed."""
    return decode(_reply, frame, MAX_MESSAGE_BYTES)


def decode(decoder: msgspec.json.Decoder[Message], frame: bytes, most_bytes: int) -> Message:
    """Parse a frame of at most `most_bytes`.  Raises Malformed."""
    if len(frame) > most_bytes:
        raise Malformed(f"message of {len(frame)} bytes exceeds {most_bytes}", b"")
    try:
        message = decoder.decode(frame)
    except msgspec.ValidationError as error:
        raise Malformed(_explained(str(error), frame), frame) from None
    except (ValueError, RecursionError) as error:  # not JSON, or thousands of open brackets
        raise Malformed(f"message: {error}, got {frame[:120]!r}", b"") from None
    if frame.isascii() and b"\\" not in frame and b"\x7f" not in frame:
        return message  # in JSON, no text of it can hold a control character then
    found = _with_control(msgspec.to_builtins(message))
    if found is not None:
        path, text = found
        raise Malformed(f"{path}: must not contain control characters, got {text[:120]!r}", frame)
    return message


def _with_control(value: Any, path: str = "") -> tuple[str, str] | None:
    """Where in a message the first text with a control character is, and the text."""
    match value:
        case str():
            return (path, value) if _CONTROL.search(value) else None
        case dict():
            parts = [(f"{path}.{key}".lstrip("."), part) for key, part in value.items()]
            parts += [(path, key) for key in value]
        case list() | tuple():
            parts = [(f"{path}[{index}]", part) for index, part in enumerate(value)]
        case _:
            return None
    return next((found for where, part in parts if (found := _with_control(part, where))), None)


def printable(text: str, most: int = 1000) -> str:
    """At most `most` characters of `text`; control characters become `?`."""
    return _CONTROL.sub("?", text[:most])


def common_version(version: int, oldest_version: int, of: tuple[int, int]) -> int | None:
    """The newest version that two peers both speak; `of` is the other one's newest and oldest."""
    newest = min(version, of[0])
    return newest if newest >= max(oldest_version, of[1]) else None


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= 256 and not _CONTROL.search(value)


def _as_json(frame: bytes) -> Any:
    try:
        return msgspec.json.decode(frame)
    except (ValueError, RecursionError):  # what follows is no JSON
        return None


def _explained(problem: str, frame: bytes) -> str:
    """msgspec says "PROBLEM - at `$.field[0]`"; people also want to read what stands there."""
    text, _, path = problem.partition(" - at `$")
    path = path.strip(".`")
    for pattern, words in _IN_WORDS.items():
        if repr(pattern) in text:
            text = words
    try:
        value = _as_json(frame)
        for key, index in re.findall(r"(\w+)|\[(\d+)\]", path):
            value = value[int(index)] if index else value[key]
        got: str | bytes = str(value)[:120]
    except (LookupError, TypeError):  # no such place
        got = frame[:120]
    return f"{path or 'message'}: {text}, got {got!r}"
