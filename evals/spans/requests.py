"""What a trace says about its request, and the list of the requests of a file."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from pydantic import BaseModel
from rich.console import Console

from dualpath_sgl.evals.spans.traces import Span, Trace
from dualpath_sgl.terminal.columns import Column, print_columns
from dualpath_sgl.terminal.units import duration
from scheduler_svc.telemetry import span_names

CLIENT_SPAN = "dualpath.request"
SHORTEST_ID = 8
"""Digits of a trace id in the list, at the least."""
ROOMY_CONSOLE = 100
"""Columns from which the mode has its place too."""
UNKNOWN = "-"


class RequestFacts(BaseModel):
    """One trace in a line; None: the trace does not say."""

    trace: str
    request: bool
    """A client, the router or the scheduler knew it; else a probe or a warm-up of an engine."""
    mode: str | None
    """Mode of the evaluation that it belongs to."""
    path: str | None
    """As planned: none, prefill, decode, split, or resident (nobody reads the store); relay where the prefill engine's client loaded."""
    room: str | None
    """In decimal digits; more of them than a number in JSON is sure to keep."""
    session: str | None
    turn: int | None
    prompt_tokens: int | None
    cached_tokens: int | None
    """Tokens of the prompt that were not computed."""
    output_tokens: int | None
    ttft_s: float | None
    duration_s: float
    store_read_bytes: int
    forwarded_bytes: int
    relayed_bytes: int
    """Of what was read from the store, what came through relays."""
    fallbacks: list[str]
    """Why it did not go as planned."""
    spans: int
    services: int

    @classmethod
    def of(cls, trace: Trace) -> RequestFacts:
        client, router, plan, whole = (
            _first(trace, name)
            for name in (CLIENT_SPAN, span_names.ROUTE, span_names.PLAN, span_names.REQUEST)
        )
        first = client or router or whole
        own = {**(router.own if router else {}), **(client.own if client else {})}
        engines = [span.attributes for span in trace.spans if "gen_ai.usage.prompt_tokens" in span.attributes]
        moved = dict.fromkeys((*span_names.STORE_READS, span_names.DECODE_TO_PREFILL), 0)
        for span in trace.spans:
            if span.operationName in moved:
                moved[span.operationName] += _number(span.own.get("bytes")) or 0
        read = sum(moved[name] for name in span_names.STORE_READS)
        loads = [span.own for span in trace.spans if span.operationName in span_names.RELAY_LOADS]
        fallbacks = [
            str(span.own["fallback.reason"])
            for span in trace.spans
            if "fallback.reason" in span.own
            and not span_names.is_named(span.operationName, span_names.REQUEST)
        ]

        def counted(name: str, usage: str) -> int | None:
            seen = [_number(attributes.get(f"gen_ai.usage.{usage}_tokens")) for attributes in engines]
            known = [own_count] if (own_count := _number(own.get(name))) is not None else []
            return max([*known, *(count for count in seen if count is not None)], default=None)

        return cls(
            trace=trace.traceID,
            request=first is not None or plan is not None,
            mode=_text(trace.resource("dualpath.mode")),
            path="relay" if loads else _text(plan.own.get("path")) if plan else None,
            room=_room(trace.spans),
            session=_text(own.get("session")),
            turn=_number(own.get("turn")),
            prompt_tokens=counted("prompt.tokens", "prompt"),
            cached_tokens=counted("cached.tokens", "cached"),
            output_tokens=counted("output.tokens", "completion"),
            ttft_s=own["ttft_s"] if isinstance(own.get("ttft_s"), float) else None,
            duration_s=(first.duration if first else trace.duration) / 1e6,
            store_read_bytes=read + sum(_number(own.get("bytes")) or 0 for own in loads),
            forwarded_bytes=moved[span_names.DECODE_TO_PREFILL],
            relayed_bytes=sum(_number(own.get("relay.bytes")) or 0 for own in loads),
            fallbacks=list(dict.fromkeys(fallbacks)),
            spans=len(trace.spans),
            services=len({trace.service(span) for span in trace.spans}),
        )

    @property
    def tokens(self) -> str:
        """Prompt and answer."""
        if self.prompt_tokens is None:
            return UNKNOWN
        return f"{self.prompt_tokens}+{self.output_tokens or 0}"

    @property
    def place(self) -> str:
        """Session and turn."""
        if self.session is None:
            return UNKNOWN
        return self.session if self.turn is None else f"{self.session}/{self.turn}"


def list_requests(traces: Sequence[Trace], console: Console, everything: bool = False) -> None:
    """Print one line per request; of `everything`, also per trace that is none."""
    found = [RequestFacts.of(trace) for trace in traces]
    shown = [facts for facts in found if facts.request or everything]
    short_ids = _telling([facts.trace for facts in found])
    columns = [
        Column("trace"),
        Column("path"),
        Column("room", right=True),
        Column("tokens", right=True),
        Column("cached", right=True),
        Column("time", right=True),
        Column("session/turn"),
    ]
    rows = [
        [
            short_ids[facts.trace],
            facts.path or UNKNOWN,
            facts.room or UNKNOWN,
            facts.tokens,
            UNKNOWN if facts.cached_tokens is None else str(facts.cached_tokens),
            duration(facts.duration_s),
            facts.place,
        ]
        for facts in shown
    ]
    if console.width >= ROOMY_CONSOLE and any(facts.mode for facts in shown):
        columns.insert(1, Column("mode"))
        for row, facts in zip(rows, shown, strict=True):
            row.insert(1, facts.mode or UNKNOWN)
    if shown:
        print_columns(console, columns, rows)
    if hidden := len(found) - len(shown):
        console.print(f"{hidden} traces of probes and warm-ups: --all", style="dim")


def _telling(ids: Sequence[str]) -> dict[str, str]:
    """For every id its beginning that no other one shares, SHORTEST_ID digits at the least."""
    ordered = sorted(set(ids))
    shared = [_shared(left, right) for left, right in pairwise(ordered)]
    neighbours = zip(ordered, (0, *shared), (*shared, 0), strict=True)
    return {one: one[: max(SHORTEST_ID, before + 1, after + 1)] for one, before, after in neighbours}


def _shared(left: str, right: str) -> int:
    """Digits that both begin with."""
    return next(
        (at for at, (one, other) in enumerate(zip(left, right, strict=False)) if one != other), len(left)
    )


def _first(trace: Trace, name: str) -> Span | None:
    """The first span of that name, alone or before a path."""
    return next((span for span in trace.spans if span_names.is_named(span.operationName, name)), None)


def _room(spans: Sequence[Span]) -> str | None:
    for span in spans:
        if "room" in span.own:
            return str(span.own["room"])
    for span in spans:
        room = span.attributes.get("bootstrap_room")
        try:
            return str(int(str(room), 16))
        except ValueError:
            continue
    return None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
