"""The commands `dualpath eval …`."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from dualpath_sgl.evals.agents.subset import write_subset
from dualpath_sgl.evals.common.explained import failures_explained
from dualpath_sgl.launch.config import CLUSTERS
from dualpath_sgl.terminal.console import errors

RESULTS = Path("results")
DEFAULT_CLUSTER = CLUSTERS / "cpu-1p1d.yaml"

eval_app = typer.Typer(no_args_is_help=True, help="Replay agent traces and compare modes.")
console = Console(highlight=False)


@eval_app.command("run")
def run(
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Session file in claude-code-weka form, or a folder of them; none: synthetic sessions."
        ),
    ] = None,
    cluster: Annotated[Path, typer.Option(help="Cluster description (YAML).")] = DEFAULT_CLUSTER,
    mode: Annotated[
        str,
        typer.Option(
            help="Comma-separated: basic, both, dualpath, or a path policy such as prefill or decode."
        ),
    ] = "basic,decode,dualpath",
    agents: Annotated[
        int, typer.Option(help="Agents in all; above the number of sessions these are re-used.")
    ] = 4,
    concurrency: Annotated[int, typer.Option(help="Requests in flight; agents take turns.")] = 4,
    turns: Annotated[int | None, typer.Option(help="Requests of each session; default: all.")] = None,
    max_context: Annotated[
        int, typer.Option(help="Longest prompt with its answer after scaling, in tokens.")
    ] = 4096,
    seed: Annotated[int, typer.Option(help="Of the random tokens and the synthetic sessions.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Result folder; default: results/<date-time>.")] = None,
) -> None:
    """Replay sessions in each mode, compare tokens with a single server, write summary, report and traces."""
    # Not before: this imports the whole cluster machinery.
    from dualpath_sgl.evals.compare import report
    from dualpath_sgl.evals.compare.run import EvalOptions, evaluate
    from dualpath_sgl.launch.config.cluster import load

    with failures_explained():
        options = EvalOptions(
            trace=trace,
            cluster=load(cluster),
            modes=tuple(name.strip() for name in mode.split(",") if name.strip()),
            agents=agents,
            concurrency=concurrency,
            turns=turns,
            max_context_tokens=max_context,
            seed=seed,
            out=out or RESULTS / datetime.now().strftime("%Y%m%d-%H%M%S"),
        )
        summary = evaluate(options, console)
    report.print_summary(summary, console)
    console.print(f"results: {options.out}/report.md, summary.json, traces.json")
    if not summary.tokens_equal:
        errors.print("[red]error:[/] tokens differ from the single server's; report.md says where")
        raise typer.Exit(1)


@eval_app.command("matrix")
def matrix(
    file: Annotated[Path, typer.Argument(help="Experiment description (YAML).")],
    out: Annotated[
        Path | None,
        typer.Option(help="Result folder, which may hold finished cells; default: results/matrix/<name>."),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Router of a deployment that runs already; nothing is started then.")
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="With --url: what `dualpath up` wrote of it, for its counters.")
    ] = None,
) -> None:
    """Run modes x topologies x traces x loads, go on where it stopped, and write an HTML report with plots."""
    from dualpath_sgl.evals.matrix.command import prepare
    from dualpath_sgl.evals.report.page import write_report

    with failures_explained():
        prepared = prepare(file, out, url, run_dir, console)
        try:
            problems = prepared.run()
        finally:
            # What was measured is worth a look however the run ended.
            if prepared.has_cells():
                console.print(f"report: {write_report(prepared.out)}", soft_wrap=True)
    for problem in problems:
        errors.print(f"[red]not as it must be:[/] {escape(problem)}")
    if problems:
        raise typer.Exit(1)


@eval_app.command("report")
def draw_report(
    folder: Annotated[Path, typer.Argument(help="Result folder of `dualpath eval matrix`.")],
) -> None:
    """Write the HTML report of an experiment anew, from the cells that are finished."""
    from dualpath_sgl.evals.report.page import write_report

    with failures_explained():
        console.print(f"report: {write_report(folder)}", soft_wrap=True)


@eval_app.command("trace-subset")
def trace_subset(
    files: Annotated[list[Path], typer.Argument(help="Session files in claude-code-weka form.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    requests: Annotated[int, typer.Option(min=1, help="First requests of each session to keep.")],
) -> None:
    """Write a small valid trace: the first requests of some sessions, only the fields that are needed."""
    with failures_explained():
        for path in write_subset(files, out, requests):
            console.print(f"{path}  {path.stat().st_size:,} bytes")


@eval_app.command("clients")
def clients(
    cluster: Annotated[
        Path, typer.Option(help="Cluster description (YAML) of one of DualPath's modes.")
    ] = DEFAULT_CLUSTER,
    only: Annotated[str, typer.Option(help="Comma-separated names of clients; default: all.")] = "",
    environment: Annotated[
        Path | None,
        typer.Option(help="Virtual environment with AIPerf and anthropic; default: one is made in .cache."),
    ] = None,
    bench_multiturn: Annotated[
        Path | None,
        typer.Option(help="benchmark/hicache/bench_multiturn.py of an SGLang checkout; none: left out."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Result folder, made anew.")] = RESULTS / "clients",
) -> None:
    """Standard clients through both routers: do they run, and do they get a single server's tokens?"""
    from dualpath_sgl.evals.clients import compare
    from dualpath_sgl.evals.clients.environment import clients_environment
    from dualpath_sgl.launch.config.cluster import load

    with failures_explained():
        config = load(cluster)
        programs = clients_environment() if environment is None else environment.absolute() / "bin"
        asking = compare.clients(config.model.directory(), programs, bench_multiturn)
        asking = compare.chosen(asking, only)
        results = compare.compare(config, asking, compare.fresh(out), console)
        compare.write(results, out)
    console.print((out / "report.md").read_text(), markup=False)
    console.print(f"results: {out}/summary.json, report.md")
