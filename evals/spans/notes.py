"""The few attributes of a span that matter, in words and with units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.text import Text

from dualpath_sgl.evals.spans.traces import Span
from dualpath_sgl.terminal.columns import plain
from dualpath_sgl.terminal.units import duration, rate, size

ALARM = "red"
RELAY, OWN_BYTES = "relay.bytes.", "own.bytes"
OWN = "own"


def notes(span: Span) -> list[Text]:
    """An error, what was moved, how fast, how long it waited, a fallback's reason, what was decided."""
    own, told = span.own, span.attributes
    error = [_alarm(f"error {told.get('otel.status_description', '')}".rstrip())] if told.get("error") else []
    lost = [_alarm(str(told["warning"]))] if "warning" in told else []
    fallback = [_alarm(f"fallback {own['fallback.reason']}")] if "fallback.reason" in own else []
    rest = [plain(text) for text in (*_of_path(own), *_of_request(own))]
    moved = [plain(text) for text in (*_of_transfer(own), *_of_lanes(own))]
    return [*error, *lost, *moved, *fallback, *rest]


def _alarm(text: str) -> Text:
    return Text(plain(text).plain, style=ALARM)


def _of_transfer(own: dict[str, Any]) -> list[str]:
    return [text(own[key]) for key, text in _TRANSFER.items() if isinstance(own.get(key), (int, float))]


_TRANSFER: dict[str, Callable[[Any], str]] = {
    "bytes": size,
    "bandwidth_bytes_per_s": rate,
    "queue_wait_s": lambda waited_s: f"wait {duration(waited_s)}",
    "pages": lambda count: f"{count} page{'' if count == 1 else 's'}",
    "tokens": lambda count: f"{count} token{'' if count == 1 else 's'}",
}


def _of_lanes(own: dict[str, Any]) -> list[str]:
    """Who brought how much of a load, where relays took part."""
    brought = {key.removeprefix(RELAY): count for key, count in own.items() if key.startswith(RELAY)}
    return (
        [f"{name} {size(count)}" for name, count in sorted({OWN: own.get(OWN_BYTES, 0), **brought}.items())]
        if brought
        else []
    )


def _of_path(own: dict[str, Any]) -> list[str]:
    found = [f"path {own['path']}"] if "path" in own else []
    if "pages.first" in own and "pages.end" in own:
        found.append(f"pages {own['pages.first']}-{own['pages.end']}")
    if "split.pages" in own and "hit.pages" in own:
        found.append(f"{own['split.pages']}/{own['hit.pages']} from decode")
    if "prefill.engine" in own and "decode.engine" in own:
        found.append(f"{own['prefill.engine']} {own['decode.engine']}")
    if isinstance(own.get("expected_s"), float) and isinstance(own.get("actual_s"), float):
        found.append(f"took {duration(own['actual_s'])}, expected {duration(own['expected_s'])}")
    if "reason" in own:
        found.append(str(own["reason"]))
    return found


def _of_request(own: dict[str, Any]) -> list[str]:
    found = [f"TTFT {duration(own['ttft_s'])}"] if isinstance(own.get("ttft_s"), float) else []
    if "session" in own:
        found.append(f"session {own['session']}")
    if "turn" in own:
        found.append(f"turn {own['turn']}")
    return found
