"""Which headers go through, in either direction."""

from __future__ import annotations

from collections.abc import Mapping

HOP_BY_HOP = {
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}
"""RFC 9110, section 7.6.1: meant for one connection only."""
OWN = {
    "host",
    "content-length",
    "content-type",
    "content-encoding",
    "accept-encoding",
    "expect",
    "traceparent",
}
"""A request's that do not go through: the router's own take their place, or the router has acted on them."""
PLACING = {
    *("x-override-bootstrap-host", "x-override-bootstrap-port", "x-override-bootstrap-room"),
    *("x-override-disagg-prefill-dp-rank", "x-override-routed-dp-rank", "x-data-parallel-rank"),
}
"""With which SGLang lets a router override the body (request_headers.py): this one writes the body."""
ANSWERED = {"content-length", "date", "server"}
"""An answer's that do not go through, likewise."""


def to_engine(headers: Mapping[str, str], traceparent: str | None) -> dict[str, str]:
    kept = forwarded(headers)
    kept["Content-Type"] = "application/json"
    return kept | ({"traceparent": traceparent} if traceparent else {})


def forwarded(headers: Mapping[str, str]) -> dict[str, str]:
    """The client's own, its key among them."""
    return {
        name: value
        for name, value in headers.items()
        if name.lower() not in HOP_BY_HOP | OWN | PLACING and _is_utf8(value)
    }


def to_client(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in HOP_BY_HOP | ANSWERED}


def _is_utf8(value: str) -> bool:
    """aiohttp takes other bytes from a client (as surrogates), but cannot send them on."""
    return not any("\ud800" <= character <= "\udfff" for character in value)
