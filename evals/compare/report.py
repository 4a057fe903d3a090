"""A summary for people: on the terminal and as `report.md`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from dualpath_sgl.evals.compare.summary import ModeResult, Summary


def rows(summary: Summary) -> list[tuple[str, ...]]:
    """The comparison, one tuple per line; the first has the names of the modes."""
    results = list(summary.modes.values())

    def line(title: str, cell) -> tuple[str, ...]:
        return (title, *(cell(result) for result in results))

    return [
        line("", lambda r: r.mode),
        line(
            "tokens equal to single server",
            lambda r: "yes" if r.tokens_equal else f"NO ({len(r.mismatches)})",
        ),
        line("requests", lambda r: str(r.requests)),
        line("JCT", lambda r: f"{r.job_s:.2f} s"),
        line("storage links alone", _limit),
        line("TTFT p50 / p99", lambda r: f"{_ms(r.ttft_s.p50)} / {_ms(r.ttft_s.p99)}"),
        line("TTST p50 / p99", lambda r: f"{_ms(r.ttst_s.p50)} / {_ms(r.ttst_s.p99)}"),
        line("TPOT p50 / p99", lambda r: f"{_ms(r.tpot_s.p50)} / {_ms(r.tpot_s.p99)}"),
        line("hit rate measured", lambda r: f"{r.hit_rate:.1%}"),
        line("hit rate theoretical", lambda r: f"{summary.workload.hit_rate:.1%}"),
        line("store read by prefill", lambda r: _mb(r.store_read_bytes.prefill)),
        line("store read by decode", lambda r: _mb(r.store_read_bytes.decode)),
        line("forwarded", lambda r: _mb(r.forwarded_bytes)),
        line("paths none/prefill/decode/split", _paths),
        line("fallbacks", lambda r: ", ".join(f"{why} {n}" for why, n in r.fallbacks.items()) or "none"),
        line(
            "pages read twice from the store",
            lambda r: "not counted" if r.duplicate_store_pages is None else str(r.duplicate_store_pages),
        ),
    ]


def print_summary(summary: Summary, console: Console) -> None:
    header, *lines = rows(summary)
    table = Table(title="Evaluation", title_justify="left")
    table.add_column("")
    for mode in header[1:]:
        table.add_column(mode, justify="right")
    for cells in lines:
        table.add_row(*cells)
    console.print(table)


def markdown(summary: Summary) -> str:
    header, *lines = rows(summary)
    work = summary.workload
    parts = [
        "# Evaluation",
        "",
        f"* Workload: {work.source}, {work.sessions} sessions, {work.requests} requests a mode, "
        f"{work.concurrency} in flight at once, seed {work.seed}.",
        f"* Every length of the trace is multiplied by {work.scale_factor:.4g} so that the longest request "
        f"has {work.longest_tokens} tokens; each request generates at least 4 tokens and adds at least one.",
        f"* Theoretical hit rate (infinite cache): {work.raw_hit_rate:.1%} of the trace as it is, "
        f"{work.hit_rate:.1%} of what was replayed, in pages of {work.page_size} tokens.",
        f"* {work.prompt_tokens:,} prompt tokens and {work.output_tokens:,} generated tokens a mode.",
        "* Next prompt = context + generated tokens + append where the trace appends; where the trace "
        "leaves its context, the prompt leaves it at the scaled place. Tool time is zero.",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(cells) + " |" for cells in lines),
        "",
        "## Bytes per engine",
        "",
        "| mode | engine | role | read from the store | forwarded from a decode engine |",
        "|---|---|---|---|---|",
    ]
    for result in summary.modes.values():
        for name, read in result.engines.items():
            parts.append(
                f"| {result.mode} | {name} | {read.role} | {_mb(read.store_read_bytes)} "
                f"| {_mb(read.forwarded_bytes)} |"
            )
    for result in summary.modes.values():
        for miss in result.mismatches:
            parts += [
                "",
                f"**{result.mode}**: session {miss.session} turn {miss.turn} generated {miss.got}, "
                f"the single server {miss.expected}.",
            ]
    if summary.traces:
        parts += [
            "",
            f"`traces.json` beside this file holds {summary.traces} traces: open it in Jaeger's UI (Search, "
            "Upload) or with `dualpath trace show`.",
        ]
    return "\n".join(parts) + "\n"


def _paths(result: ModeResult) -> str:
    paths = result.paths
    return f"{paths.none}/{paths.prefill}/{paths.decode}/{paths.split}"


def _limit(result: ModeResult) -> str:
    return "no rate set" if result.storage_limit_s is None else f"{result.storage_limit_s:.2f} s"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


def _mb(count_bytes: int) -> str:
    return f"{count_bytes / 1e6:.1f} MB"
