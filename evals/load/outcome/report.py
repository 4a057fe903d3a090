"""The load benchmark's tables on the terminal."""

from __future__ import annotations

import statistics

from rich.console import Console
from rich.table import Table

from dualpath_sgl.evals.load.outcome.cells import Cell, Sample
from dualpath_sgl.evals.load.outcome.figures import TARGETS, Figure
from dualpath_sgl.evals.load.outcome.summary import Details, LoadSummary

STORAGE_BOUND = 0.95


def print_summary(summary: LoadSummary, console: Console) -> None:
    details = summary.details
    columns = ("figure", "measured", "spread (repetitions)", "target", "limit", "paper", "")
    table = Table(*columns, title="Load paths")
    for name in TARGETS:
        figure = details.figures[name]
        sign = "≥" if figure.at_least else "≤"
        verdict = "not measured" if figure.met is None else "met" if figure.met else "[red]missed[/]"
        table.add_row(
            figure.what,
            "-" if figure.value is None else f"{figure.value:.4g}",
            _spread(figure),
            f"{sign} {figure.target:.3g}",
            "-" if figure.limit is None else f"{figure.limit:.3g}",
            figure.paper,
            verdict,
        )
    equal = "yes" if summary.tokens_equal else "[red]NO[/]"
    table.add_row("tokens equal in every cell", equal, "", "yes", "", "", "")
    console.print(table)
    cells = Table("cell", "JCT", "TTFT", "store bytes", "busiest storage link", title="Cells (medians)")
    for name, cell in details.cells.items():
        cells.add_row(
            name,
            f"{cell.job_s:.2f} s",
            f"{cell.ttft_s:.2f} s",
            f"{cell.storage_bytes / 1e6:.1f} MB",
            "-" if cell.busiest_link is None else f"{cell.busiest_link:.1%}",
        )
    console.print(cells)
    _print_details(details, console)


def describe(cell: Cell, sample: Sample) -> str:
    """One measurement in a line."""
    busy = ""
    if sample.storage_utilisation:
        shares = (
            f"{engine} {share:.1%}" for engine, share in sample.storage_utilisation.items() if share > 0.01
        )
        busy = ", storage links busy: " + ", ".join(shares)
    fault = f", fault after {sample.fault.after_s:.1f} s" if sample.fault else ""
    equal = "" if sample.tokens_equal else ", TOKENS DIFFER"
    read = sum(sample.storage_bytes.values()) / 1e6
    return (
        f"{cell.name}: JCT {sample.job_s:.2f} s, TTFT {sample.ttft_s[0]:.2f} s, {read:.1f} MB read, "
        f"{sample.cached_tokens} tokens cached{busy}{fault}{equal}"
    )


def _spread(figure: Figure) -> str:
    if figure.low is None or figure.high is None:
        return ""
    return f"{figure.low:.4g}-{figure.high:.4g} ({figure.repetitions})"


def _print_details(details: Details, console: Console) -> None:
    if details.basic_utilisation is not None:
        is_bound = details.basic_utilisation >= STORAGE_BOUND
        bound = "storage-bound" if is_bound else "[red]not storage-bound[/]"
        console.print(f"basic keeps its storage link {details.basic_utilisation:.1%} busy ({bound})")
    for mode, ratio in details.near_bound_jct_ratio.items():
        console.print(
            f"with faster links, {details.near_bound_utilisation or 0:.1%} busy, JCT basic/{mode} is {ratio:.2f} "
            f"({ratio / 2:.0%} of the limit)"
        )
    if details.store_capacity_bytes_per_s is not None:
        console.print(
            f"store node: at most {details.store_peak_bytes_per_s / 1e6:.0f} MB/s sent in a shaped "
            f"measurement, {details.store_capacity_bytes_per_s / 1e6:.0f} MB/s possible"
        )
    if details.goodput is not None:
        console.print(
            f"forwarding {details.goodput.size_bytes / 1e6:.1f} MB, unshaped: "
            f"{statistics.median(details.goodput.forward_bytes_per_s) / 1e6:.0f} MB/s, Mooncake alone "
            f"{statistics.median(details.goodput.raw_bytes_per_s) / 1e6:.0f} MB/s"
        )
    for mode, processes in details.cpu_s_per_gib.items():
        told = ", ".join(f"{name} {seconds:.1f}" for name, seconds in processes.items() if seconds > 0.05)
        console.print(f"CPU seconds a GiB loaded, waiting included, 1P1D {mode}: {told}")
    if len(details.sources) > 1:
        console.print(
            f"[yellow]the sources changed between the cells ({', '.join(details.sources)})[/]: compare only "
            "what was measured with the same ones"
        )
