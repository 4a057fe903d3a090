"""The demo: the same real agent sessions on SGLang as it is and with DualPath, storage being the bottleneck of both.

The cluster (launch/clusters/demo.yaml) has pools too small for the sessions' contexts, so most of what
a turn needs comes from the store, and every engine reads the store at the same low rate.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from dualpath_sgl.evals.agents.trace import SHIPPED
from dualpath_sgl.evals.common.explained import failures_explained
from dualpath_sgl.evals.compare import picture
from dualpath_sgl.evals.compare.run import DUALPATH, EvalOptions, evaluate
from dualpath_sgl.evals.compare.summary import ModeResult, Summary
from dualpath_sgl.evals.spans import waterfall
from dualpath_sgl.evals.spans.requests import RequestFacts
from dualpath_sgl.evals.spans.traces import Trace, read_traces
from dualpath_sgl.launch.config import CLUSTERS
from dualpath_sgl.launch.config.cluster import ClusterConfig, Mode, bits_per_s, load
from dualpath_sgl.terminal.columns import Column, print_columns
from dualpath_sgl.terminal.console import errors, output
from dualpath_sgl.terminal.units import duration, rate, size
from scheduler_svc.telemetry.span_names import STORE_TO_DECODE, STORE_TO_PREFILL
from scheduler_svc.wire.protocol import Role

OUT = Path("results/demo")
TRACE = SHIPPED / "claude-code-weka"
CLUSTER = CLUSTERS / "demo.yaml"
BASIC = Mode.BASIC.value
MIN_REQUESTS = 60
"""Of each mode."""
MIN_SESSIONS = 4


def main() -> int:
    """Run the demo; 0 only if every condition of `unmet` holds."""
    console = output()
    if OUT.exists():
        shutil.rmtree(OUT)
    with failures_explained():
        cluster = load(CLUSTER)
        console.print(_opening(cluster), markup=False)
        summary = evaluate(
            EvalOptions(
                trace=TRACE,
                cluster=cluster,
                modes=(BASIC, DUALPATH),
                agents=18,
                concurrency=4,
                turns=5,
                max_context_tokens=1024,
                seed=1,
                out=OUT,
            ),
            console,
        )
        picture.draw(summary, OUT / "demo.png")
        split = split_request(_traces())
    tell(summary, split, console)
    problems = unmet(summary, split)
    for problem in problems:
        errors.print(f"[red]not as it must be:[/] {problem}")
    return 1 if problems else 0


def unmet(summary: Summary, split: Trace | None) -> list[str]:
    """What the demo must show and this summary does not."""
    result = summary.modes[DUALPATH]
    conditions = {
        "tokens equal to the single server's in both modes": summary.tokens_equal,
        f"requests >= {MIN_REQUESTS} in each mode": min(r.requests for r in summary.modes.values())
        >= MIN_REQUESTS,
        f"sessions >= {MIN_SESSIONS}": summary.sessions >= MIN_SESSIONS,
        "a request took the split path": result.paths.split > 0,
        "the prefill engine read the store": result.store_read_bytes.prefill > 0,
        "the decode engine read the store": result.store_read_bytes.decode > 0,
        "pages were forwarded": result.forwarded_bytes > 0,
        "no page was read from the store twice for one request": result.duplicate_store_pages == 0,
        "traces.json shows a request that both engines read": split is not None,
    }
    return [condition for condition, holds in conditions.items() if not holds]


def split_request(traces: list[Trace]) -> Trace | None:
    """The request that both engines read from the store in the largest shares.

    Those that went as planned come first.
    """
    shares = {trace.traceID: _store_shares(trace) for trace in traces}
    both = [trace for trace in traces if len(shares[trace.traceID]) > 1]
    as_planned = [trace for trace in both if not RequestFacts.of(trace).fallbacks]
    return max(as_planned or both, key=lambda trace: min(shares[trace.traceID].values()), default=None)


def tell(summary: Summary, split: Trace | None, console: Console) -> None:
    """Print what was found, one request as an example, and where to go on."""
    basic, dualpath = summary.modes[BASIC], summary.modes[DUALPATH]
    console.print()
    columns = [Column(""), Column(BASIC, right=True), Column(DUALPATH, right=True), Column("")]
    print_columns(console, columns, _rows(basic, dualpath, summary.workload.hit_rate))
    console.print()
    console.print("\n".join(_limit(basic, dualpath)), markup=False)
    if split is not None:
        console.print("\nA request that both engines read, in time:\n", style="bold")
        waterfall.show(split, console)
    console.print()
    for line in _closing(split):
        console.print(line, soft_wrap=True)


def _opening(cluster: ClusterConfig) -> str:
    per_engine = rate(bits_per_s(cluster.store.read_rate or "") / 8)
    return (
        "A real agent trace, replayed three times on this machine: by one SGLang server, whose tokens are "
        f"the reference; by two engines of SGLang as it is ({BASIC}: only the prefill engine reads the "
        f"store); and by the same two with DualPath. In both each engine reads at most {per_engine}."
    )


def _rows(basic: ModeResult, dualpath: ModeResult, most_hits: float) -> Iterator[tuple[str, str, str, str]]:
    def row(title: str, cell, note: str = "") -> tuple[str, str, str, str]:
        return title, cell(basic), cell(dualpath), note

    yield row("mode", lambda r: r.cluster_mode, "chosen by model and flags")
    faster = f"{basic.job_s / dualpath.job_s:.2f} times as fast"
    yield row("job completion time", lambda r: duration(r.job_s), faster)
    yield row(
        "  storage alone (limit)", lambda r: duration(r.storage_limit_s or 0), _at_best(basic, dualpath)
    )
    yield row("first token, median", lambda r: duration(r.ttft_s.p50))
    yield row("requests", lambda r: str(r.requests))
    yield row("tokens as one server's", lambda r: "all" if r.tokens_equal else f"NO ({len(r.mismatches)})")
    yield row("prompt tokens in caches", lambda r: f"{r.hit_rate:.1%}", f"{most_hits:.1%} at best")
    yield row("path none", lambda r: _path(r, "none"), "nothing to load")
    yield row("path prefill", lambda r: _path(r, "prefill"), "decode engine reads nothing")
    yield row("path decode", lambda r: _path(r, "decode"), "prefill engine reads nothing")
    yield row("path split", lambda r: _path(r, "split"), "both read")
    for name in sorted(dualpath.engines, reverse=True):  # Prefill engines first.
        yield row(f"read by {name}", lambda r, name=name: size(r.engines[name].store_read_bytes))
    yield row("forwarded to prefill", lambda r: size(r.forwarded_bytes))
    reasons = ", ".join(f"{reason} {count}" for reason, count in dualpath.fallbacks.items())
    yield row("not as planned", lambda r: _planned(r, str(sum(r.fallbacks.values()))), reasons)


def _path(result: ModeResult, path: str) -> str:
    return _planned(result, str(getattr(result.paths, path)))


def _planned(result: ModeResult, told: str) -> str:
    return "-" if result.policy is None else told


def _at_best(basic: ModeResult, dualpath: ModeResult) -> str:
    if not basic.storage_limit_s or not dualpath.storage_limit_s:
        return ""
    return f"{basic.storage_limit_s / dualpath.storage_limit_s:.2f} times at best"


def _limit(basic: ModeResult, dualpath: ModeResult) -> Iterator[str]:
    yield "The limit is the time that the storage links alone need for the bytes read."
    yield f"{BASIC} has one link, {DUALPATH} two: for the same bytes that is half the time."
    unread = dualpath.forwarded_bytes - dualpath.store_read_bytes.decode
    if unread > 0:
        yield f"{size(unread)} were forwarded out of the decode engine's memory, without a read."


def _closing(split: Trace | None) -> Iterator[Text]:
    program = _program()
    for what, where in (
        ("picture", "demo.png"),
        ("report", "report.md (numbers: summary.json)"),
        ("traces", "traces.json (also for Jaeger: Search, Upload)"),
    ):
        yield Text(f"{what:<9}{OUT}/{where}")
    yield Text("\nNext:", style="bold")
    wanted = split.traceID[:8] if split is not None else "ID"
    for command, why in (
        (f"{program} trace show --list", "every request of both runs"),
        (f"{program} trace show {wanted} --verbose", "all that is known of one"),
        (f"{program} up -c {_near(CLUSTERS / 'cpu-1p1d.yaml')}", "a cluster to send requests to"),
    ):
        yield Text(f"  {command}\n      {why}")


def _traces() -> list[Trace]:
    file = OUT / "traces.json"
    return read_traces(file) if file.exists() else []


_SIDES = {STORE_TO_PREFILL: Role.PREFILL, STORE_TO_DECODE: Role.DECODE}


def _store_shares(trace: Trace) -> dict[str, int]:
    """Role -> bytes that its engine read from the store."""
    shares: dict[str, int] = {}
    for span in trace.spans:
        if (side := _SIDES.get(span.operationName)) is not None:
            shares[side] = shares.get(side, 0) + span.own.get("bytes", 0)
    return shares


def _program() -> str:
    """How to call `dualpath` from here."""
    installed, found = Path(sys.executable).with_name("dualpath"), shutil.which("dualpath")
    return "dualpath" if found and Path(found) == installed else str(_near(installed))


def _near(path: Path) -> Path:
    """Relative to the working directory where it lies below that."""
    path = path.absolute()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
