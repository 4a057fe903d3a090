"""Tables of the load cells that `evals/gpu/loads.py` measured, and where lone loads spent their time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any, NamedTuple

from dualpath_sgl.evals.gpu.goodput import PLAIN, RAW_READS, Goodput
from dualpath_sgl.evals.gpu.loads import DUALPATH, LONE_POLICIES, RESIDENT_POLICY, Cell, LoadPlan, cell_name
from scheduler_svc.telemetry.span_names import DECODE_TO_PREFILL, STORE_TO_DECODE, STORE_TO_PREFILL

UPSTREAM = "basic"
STAGES = (
    ("prefill", STORE_TO_PREFILL),
    ("decode", STORE_TO_DECODE),
    ("prefill", DECODE_TO_PREFILL),
    ("prefill", "load_back"),
    ("prefill", "prefill_forward"),
    ("prefill", "prefill_transfer_kv_cache"),
    ("decode", "restore"),
)
"""Role and span; the spans are DualPath's (docs/design.md) and SGLang's own."""
LONE_ROWS = (
    ("held on both devices", DUALPATH, "held"),
    ("held on the prefill device only", DUALPATH, "sent"),
    ("held by the decode engine only", RESIDENT_POLICY, "resident"),
    *((f"`{policy}`", policy, "lone") for policy in LONE_POLICIES),
    ("upstream, held on the device", UPSTREAM, "held"),
    ("upstream, `basic`", UPSTREAM, "lone"),
)
FORWARD_LIMITS = "0.9 to 1"
"""Target and limit of forward goodput over Mooncake alone."""

Cells = dict[str, Cell]


def stage_times(
    traces: Iterable[dict[str, Any]], windows_ns: Sequence[tuple[int, int]]
) -> dict[str, tuple[float, float]]:
    """Stage -> medians of (begin after the window's, length) in seconds; a window is one lone request.

    `traces` are Jaeger's (evals/spans/jaeger.py).  A stage that ran twice for a request counts from its first
    begin to its last end; one that did not run in every window is left out.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    spans = [_span(trace, span) for trace in traces for span in trace["spans"]]
    for first_ns, last_ns in windows_ns:
        began = [span for span in spans if first_ns <= span.begun_ns < last_ns]
        for role in {role for role, _ in STAGES}:
            of_role = [span for span in began if span.role == role]
            if not of_role:
                continue
            # Health checks pass through engines too; the request is the longest thing in its window.
            request = max(of_role, key=lambda span: span.ended_ns - span.begun_ns)
            for name in {span.name for span in of_role if (role, span.name) in STAGES}:
                parts = [span for span in of_role if span.name == name and span.trace == request.trace]
                if parts:
                    begun_ns = min(span.begun_ns for span in parts)
                    length_ns = max(span.ended_ns for span in parts) - begun_ns
                    found.setdefault(f"{role} {name}", []).append((begun_ns - first_ns, length_ns))
    return {
        stage: (median(begun for begun, _ in times) / 1e9, median(length for _, length in times) / 1e9)
        for stage, times in found.items()
        if len(times) == len(windows_ns)
    }


class _Span(NamedTuple):
    trace: str
    role: str
    name: str
    begun_ns: int
    ended_ns: int


def _span(trace: dict[str, Any], span: dict[str, Any]) -> _Span:
    service = trace["processes"][span["processID"]]["serviceName"]
    begun_ns = span["startTime"] * 1000
    ended_ns = begun_ns + span["duration"] * 1000
    return _Span(trace["traceID"], service.partition("-")[0], span["operationName"], begun_ns, ended_ns)


def tables(cells: Cells, plan: LoadPlan, goodputs: Sequence[Goodput] = ()) -> str:
    """Markdown of what the plan asks for; cells that were not measured are shown as `-`."""
    parts = []
    if plan.lengths:
        parts += [_lone_times(cells, plan), _lone_ratios(cells, plan)]
    if plan.burst_requests:
        parts.append(_bursts(cells, plan))
    if goodputs:
        parts.append(_goodputs(goodputs))
    if plan.lengths:
        parts.append(_stages(cells, max(plan.lengths)))
    return "\n".join(parts)


def burst_limit(policy: str, decode_engines: int) -> int:
    """What JCT basic/policy can be on one prefill engine when all engines read at equal rates: how
    many engines the policy lets read.
    """
    return {"prefill": 1, "decode": decode_engines}.get(policy, 1 + decode_engines)


def load_s(cells: Cells, mode: str, tokens: int) -> float | None:
    """What loading adds to a lone request: its TTFT minus that of the same cluster with the prompt held."""
    loaded = cells.get(cell_name(mode, "lone", tokens))
    held = cells.get(cell_name(UPSTREAM if mode == UPSTREAM else DUALPATH, "held", tokens))
    return loaded.median_ttft_s - held.median_ttft_s if loaded and held else None


def _lone_times(cells: Cells, plan: LoadPlan) -> str:
    def shown(mode: str, load: str, tokens: int) -> str:
        cell = cells.get(cell_name(mode, load, tokens))
        if cell is None:
            return "-"
        load_time_s = load_s(cells, mode, tokens) if load == "lone" else None
        return f"{cell.median_ttft_s:.3f}" + (f" ({load_time_s:.3f})" if load_time_s is not None else "")

    return _table(
        ["TTFT (load time), median, s", *(f"{tokens} tokens" for tokens in plan.lengths)],
        [[label, *(shown(mode, load, tokens) for tokens in plan.lengths)] for label, mode, load in LONE_ROWS],
    )


def _lone_ratios(cells: Cells, plan: LoadPlan) -> str:
    def ttft_s(mode: str, tokens: int) -> float | None:
        cell = cells.get(cell_name(mode, "lone", tokens))
        return cell.median_ttft_s if cell else None

    def load_time_s(mode: str, tokens: int) -> float | None:
        return load_s(cells, mode, tokens)

    rows = (
        ("load time", load_time_s, "split", UPSTREAM, "0.5"),
        ("TTFT", ttft_s, "split", UPSTREAM, "-"),
        ("TTFT", ttft_s, "decode", "prefill", "1"),
        ("TTFT", ttft_s, "prefill", UPSTREAM, "1"),
    )
    return _table(
        ["lone request", *(f"{tokens} tokens" for tokens in plan.lengths), "limit"],
        [
            [
                f"{what} `{above}`/`{below}`",
                *(_ratio(time_s(above, tokens), time_s(below, tokens)) for tokens in plan.lengths),
                limit,
            ]
            for what, time_s, above, below, limit in rows
        ],
    )


def _bursts(cells: Cells, plan: LoadPlan) -> str:
    def cell(mode: str, load: str = "burst") -> Cell | None:
        return cells.get(cell_name(mode, load, plan.burst_tokens))

    bursts = [found for found in cells.values() if found.load == "burst"]
    engines = sorted({engine for found in bursts for engine in found.store_bytes}, key=_prefill_first)

    def row(label: str, found: Cell | None, limit: int | None) -> list[str]:
        if found is None:
            return [label] + ["-"] * (3 + len(engines))
        upstream = cell(UPSTREAM)
        samples = len(found.job_s)
        return [
            label,
            f"{found.median_job_s:.2f}",
            "-" if limit is None else _ratio(upstream.median_job_s if upstream else None, found.median_job_s),
            "-" if limit is None else f"{limit}",
            *(f"{found.store_bytes.get(engine, 0) / samples / 1e6:.0f}" for engine in engines),
        ]

    held = [
        row("held on both devices", cell(DUALPATH, "burst held"), None),
        row("upstream, held on the device", cell(UPSTREAM, "burst held"), None),
    ]
    return _table(
        [
            f"{plan.burst_requests} prompts of {plan.burst_tokens} at once",
            "JCT, s",
            "JCT `basic`/this",
            "limit",
            *(f"`{engine}` read, MB" for engine in engines),
        ],
        [
            row("upstream, `basic`", cell(UPSTREAM), None),
            *(
                row(f"`{policy}`", cell(policy), burst_limit(policy, plan.decode_engines))
                for policy in plan.burst_policies
            ),
            *(held if plan.held else []),
        ],
    )


def _goodputs(goodputs: Sequence[Goodput]) -> str:
    def rate(bytes_per_s: float | None) -> str:
        return "-" if bytes_per_s is None else f"{bytes_per_s / 1e9:.2f}"

    def raw(found: Goodput, label: str) -> float | None:
        rates = found.raw_bytes_per_s.get(label)
        return median(rates) if rates else None

    def spread(values: Iterable[int]) -> str:
        found = sorted(values)
        return " to ".join(str(value) for value in dict.fromkeys((found[0], found[-1]))) if found else "-"

    rows = [
        ["forwarded, MB", *(f"{found.size_bytes / 1e6:.0f}" for found in goodputs)],
        ["forward, GB/s", *(rate(found.bytes_per_s) for found in goodputs)],
        ["calls of Mooncake", *(spread(item.transfers for item in found.forwards) for found in goodputs)],
        ["blocks", *(spread(item.blocks for item in found.forwards) for found in goodputs)],
        *(
            [f"Mooncake alone, {read.label}, GB/s", *(rate(raw(found, read.label)) for found in goodputs)]
            for read in RAW_READS
        ),
        [
            f"forward / Mooncake alone ({PLAIN}); target and limit {FORWARD_LIMITS}",
            *(_ratio(found.bytes_per_s, raw(found, PLAIN)) for found in goodputs),
        ],
    ]
    return _table(
        ["pages out of a decode engine's memory", *(f"{found.tokens} tokens" for found in goodputs)], rows
    )


def _prefill_first(engine: str) -> tuple[bool, str]:
    return not engine.startswith("prefill"), engine


def _stages(cells: Cells, tokens: int) -> str:
    modes = (*LONE_POLICIES, UPSTREAM)
    found = [cells[name] for mode in modes if (name := cell_name(mode, "lone", tokens)) in cells]
    names = [" ".join(stage) for stage in STAGES]

    def shown(cell: Cell, stage: str) -> str:
        if stage not in cell.stages_s:
            return "-"
        begun_s, length_s = cell.stages_s[stage]
        return f"{begun_s:.3f} + {length_s:.3f}"

    return _table(
        [f"lone, {tokens} tokens: begin + length, s", *(f"`{cell.mode}`" for cell in found)],
        [[stage, *(shown(cell, stage) for cell in found)] for stage in names],
    )


def _ratio(above: float | None, below: float | None) -> str:
    return "-" if above is None or not below else f"{above / below:.3f}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
