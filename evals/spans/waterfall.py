"""One trace as a waterfall in the terminal: a tree of its spans, each with a bar over time.

Spans of SGLang that are too short to see are left out, and equal ones in a row share a line, unless
everything is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from dualpath_sgl.evals.spans.notes import notes
from dualpath_sgl.evals.spans.requests import CLIENT_SPAN, ROOMY_CONSOLE, RequestFacts
from dualpath_sgl.evals.spans.traces import Span, Trace
from dualpath_sgl.terminal.columns import fit, plain, print_line
from dualpath_sgl.terminal.units import duration, size
from scheduler_svc.telemetry import span_names

SHORT = 1 / 200
"""Share of the trace's length; a shorter span of SGLang's is left out."""
DETAILS = (span_names.STORE_TO_RELAY,)
"""Many to a load, whose own line says what they brought."""
MOST_INDENTED = 12
"""Levels; deeper ones stand below each other."""
MOST_SERVICE = 12
_SIZES = ((160, 40, 44), (ROOMY_CONSOLE, 20, 31), (0, 8, 21))
"""Console at least so wide: columns of the bars, most columns of the names."""
COLOURS = ("cyan", "green", "magenta", "yellow", "blue")
_PROCESS = re.compile(r"\s*\((?:host|pid):[^)]*\)|\s*\[(?:TP|PP|DP) 0\]")
_REQUEST_ID = re.compile(r"(?<=Req )[0-9a-f]{8}$")


@dataclass
class _Line:
    depth: int
    span: Span
    name: str
    service: str
    begin: int
    end: int
    count: int = 1
    """Spans in a row that share it."""
    guide: str = ""


@dataclass(frozen=True)
class _Layout:
    """Columns of the parts of a line; what is left is for attributes."""

    name: int
    service: int
    start: int
    """0: the bar has to do."""
    time: int
    bar: int
    gap: str
    """Between two attributes."""

    @classmethod
    def of(cls, width: int, lines: list[_Line]) -> _Layout:
        bar, most_name = next(sizes for least, *sizes in _SIZES if width >= least)
        roomy = width >= ROOMY_CONSOLE
        return cls(
            name=min(most_name, max(len(line.guide) + len(_label(line)) for line in lines)),
            service=min(MOST_SERVICE, max(len(line.service) for line in lines)),
            start=8 if roomy else 0,
            time=max(len(_time(line)) for line in lines),
            bar=bar,
            gap="  " if roomy else " ",
        )

    def line(self, name: Text, service: Text, start: Text, time: Text, bar: Text, what: Text) -> Text:
        cells = [fit(name, self.name), fit(service, self.service)]
        cells += [fit(start, self.start, right=True)] if self.start else []
        return Text(" ").join([*cells, fit(time, self.time, right=True), fit(bar, self.bar), what])


def show(trace: Trace, console: Console, verbose: bool = False) -> None:
    """Print the spans as a tree; `verbose`: every span, each with all its attributes."""
    everything = [
        _Line(depth, span, _short_name(span.operationName), trace.service(span), span.startTime, span.end)
        for depth, span in trace.tree()
    ]
    lines = everything if verbose else list(_merged(_visible(everything, trace.duration)))
    ascii_only = console.options.ascii_only
    _draw_guides(lines, ascii_only, console.width >= ROOMY_CONSOLE)
    layout = _Layout.of(console.width, lines)
    begin, total = trace.begin, max(1, trace.duration)
    names = sorted({line.service for line in lines})
    colours = {service: COLOURS[index % len(COLOURS)] for index, service in enumerate(names)}
    facts = RequestFacts.of(trace)

    for text in _headlines(facts):
        console.print(plain(text))
    titles = ("span", "where", "start", "time", "0" + duration(total / 1e6).rjust(layout.bar - 1), "what")
    print_line(console, layout.line(*(Text(title, style="dim") for title in titles)))
    for line in lines:
        what = [] if verbose else notes(line.span)
        if line is lines[0] and facts.path and not verbose and "path" not in line.span.own:
            what.insert(0, Text(f"path {facts.path}"))
        drawn = layout.line(
            plain(line.guide + _label(line)),
            Text(plain(line.service).plain, style=colours[line.service]),
            Text(duration((line.begin - begin) / 1e6), style="dim"),
            Text(_time(line)),
            Text(
                _bar(line.begin - begin, line.end - line.begin, total, layout.bar, ascii_only),
                style=colours[line.service],
            ),
            Text(layout.gap).join(what),
        )
        print_line(console, drawn)
        if verbose:
            for key, value in sorted(line.span.attributes.items()):
                console.print(plain(f"    {key} = {value}"), style="dim", overflow="fold")
    if hidden := len(everything) - sum(line.count for line in lines):
        console.print(f"{hidden} spans that matter little, and all attributes: --verbose", style="dim")


def _headlines(facts: RequestFacts) -> Iterator[str]:
    yield f"trace {facts.trace}  {facts.spans} spans  {facts.services} services"
    known = [
        facts.mode and f"mode {facts.mode}",
        facts.path and f"path {facts.path}",
        facts.prompt_tokens is not None
        and f"{facts.prompt_tokens} tokens, {facts.cached_tokens or 0} cached",
        facts.output_tokens is not None and f"{facts.output_tokens} generated",
        duration(facts.duration_s),
    ]
    yield "  ".join(part for part in known if part)
    moved = [
        facts.store_read_bytes and f"{size(facts.store_read_bytes)} read from the store",
        facts.forwarded_bytes and f"{size(facts.forwarded_bytes)} forwarded",
        facts.relayed_bytes and f"{size(facts.relayed_bytes)} by relays",
        *(f"fallback {reason}" for reason in facts.fallbacks),
        facts.room and f"room {facts.room}",
    ]
    if any(moved):
        yield "  ".join(part for part in moved if part)


def _visible(lines: list[_Line], total: int) -> list[_Line]:
    """Without details, and SGLang's spans that are too short to see; a parent stays with its children."""
    kept: list[_Line] = []
    wanted: set[int] = set()
    """Depths of which a parent is wanted."""
    for line in reversed(lines):
        span = line.span
        matters = span.own or "error" in span.attributes or line.end - line.begin >= total * SHORT
        if span.operationName in DETAILS:
            matters = "error" in span.attributes
        if matters or line.depth in wanted:
            kept.append(line)
            wanted.add(line.depth - 1)
        wanted.discard(line.depth)
    return kept[::-1]


def _merged(lines: list[_Line]) -> Iterator[_Line]:
    """Spans of SGLang's with one name that follow each other, as one line."""
    open_line: _Line | None = None
    for index, line in enumerate(lines):
        is_leaf = index + 1 == len(lines) or lines[index + 1].depth <= line.depth
        mergeable = is_leaf and not line.span.own and "error" not in line.span.attributes
        if open_line is not None:
            alike = (open_line.depth, open_line.name, open_line.service) == (
                line.depth,
                line.name,
                line.service,
            )
            if mergeable and alike:
                open_line.end, open_line.count = max(open_line.end, line.end), open_line.count + 1
                continue
            yield open_line
            open_line = None
        if mergeable:
            open_line = line
        else:
            yield line
    if open_line is not None:
        yield open_line


def _draw_guides(lines: list[_Line], ascii_only: bool, roomy: bool) -> None:
    """Branches of the tree, from each line's depth and those of the lines below it."""
    down, branch, last, none = ("| ", "|-", "`-", "  ") if ascii_only else ("│ ", "├─", "└─", "  ")
    if not roomy:
        down, branch, last, none = down[0], branch[0], last[0], none[0]
    goes_on: set[int] = set()
    """Depths at which a line further down hangs from the same parent."""
    for line in reversed(lines):
        depth = line.depth
        if depth:
            shown_depth = min(depth, MOST_INDENTED)
            above = range(depth - shown_depth + 1, depth)
            line.guide = "".join(down if level in goes_on else none for level in above)
            line.guide += branch if depth in goes_on else last
        goes_on = {level for level in goes_on if level < depth} | {depth}


def _time(line: _Line) -> str:
    return duration((line.end - line.begin) / 1e6)


def _label(line: _Line) -> str:
    return line.name if line.count == 1 else f"{line.name} x{line.count}"


def _short_name(name: str) -> str:
    """Without process numbers, request ids and ranks 0 (`Prefill Scheduler [TP 0] (host:... | pid:...)`)."""
    return "request" if name == CLIENT_SPAN else _REQUEST_ID.sub("", _PROCESS.sub("", name)).strip()


def _bar(offset: int, length: int, total: int, width: int, ascii_only: bool) -> str:
    first = min(width - 1, offset * width // total)
    count = max(1, min(width - first, round(length * width / total)))
    return " " * first + ("=" if ascii_only else "━") * count
