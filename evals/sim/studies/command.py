"""The commands `dualpath sim run` and `dualpath sim paper`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.common.explained import failures_explained
from dualpath_sgl.evals.sim.model.cluster import Simulation
from dualpath_sgl.evals.sim.model.hardware import Hardware
from dualpath_sgl.evals.sim.model.models import DS_660B, MODELS
from dualpath_sgl.evals.sim.model.setup import MODES, Mode, Setup
from dualpath_sgl.evals.sim.model.workload import (
    PAGE_TOKENS,
    table2_trajectories,
    trace_trajectories,
    workload,
)
from dualpath_sgl.evals.sim.studies import absolute, paper
from dualpath_sgl.evals.sim.studies.bench import Bench
from dualpath_sgl.evals.sim.studies.figures import BY_CONSTRUCTION, Figure, write
from dualpath_sgl.evals.sim.studies.sensitivity import Variation, variations
from dualpath_sgl.terminal.console import errors

BYTES_PER_GBIT = 1e9 / 8

sim_app = typer.Typer(no_args_is_help=True, help="Simulate clusters that are not at hand.")
console = Console(highlight=False, soft_wrap=True)


@sim_app.command("run")
def run(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = DS_660B.name,
    prefill_nodes: Annotated[int, typer.Option(min=1, max=4096)] = 2,
    decode_nodes: Annotated[int, typer.Option(min=1, max=4096)] = 4,
    gpus_per_node: Annotated[int, typer.Option(min=1, max=64, help="One engine is one GPU.")] = 8,
    storage_gbit: Annotated[float, typer.Option(help="Storage link of a node, Gbit/s.")] = 400.0,
    compute_gbit: Annotated[float, typer.Option(help="Compute link of a GPU, Gbit/s.")] = 400.0,
    prefill_tflops: Annotated[float, typer.Option(help="Sustained by one GPU in prefill.")] = 298.0,
    hbm_gb: Annotated[float, typer.Option(help="Memory of one GPU.")] = 80.0,
    agents: Annotated[int, typer.Option(min=1, max=1_000_000, help="All start at once.")] = 512,
    row: Annotated[str, typer.Option(help="Of the paper's Table 2: 32k, 48k or 64k.")] = "64k",
    trace: Annotated[
        Path | None, typer.Option(help="Instead: session file in claude-code-weka form, or a folder of them.")
    ] = None,
    modes: Annotated[
        str,
        typer.Option(
            help=f"Comma-separated, the first is the reference: {', '.join(MODES)}, or PLACEMENT/PATH such "
            "as paper/split or random/shorter_queue."
        ),
    ] = "basic,dualpath,split,oracle",
    scheduler: Annotated[
        str, typer.Option(help="policies, or service: the scheduler's whole state, by messages (slower).")
    ] = "policies",
    seed: Annotated[int, typer.Option(help="Of trajectories, their choice and random placement.")] = 1,
) -> None:
    """What would a cluster gain?  Agents replay their trajectories until all are done."""
    with failures_explained():
        hardware = Hardware(
            gpus_per_node=gpus_per_node,
            storage_bytes_per_s=_positive("storage-gbit", storage_gbit) * BYTES_PER_GBIT,
            compute_bytes_per_s=_positive("compute-gbit", compute_gbit) * BYTES_PER_GBIT,
            prefill_flop_per_s=_positive("prefill-tflops", prefill_tflops) * 1e12,
            hbm_bytes=_positive("hbm-gb", hbm_gb) * 1e9,
        )
        if model not in MODELS:
            raise EvalError(f"model {model!r} is unknown; choose one of {', '.join(MODELS)}")
        names = [name.strip() for name in modes.split(",") if name.strip()]
        if not names:
            raise EvalError("modes is empty; name at least one")
        setups = {
            name: Setup(MODELS[model], hardware, prefill_nodes, decode_nodes, _mode(name), scheduler, seed)
            for name in names
        }
        console.print("[dim]drawing trajectories[/]" if trace is None else f"[dim]reading {trace}[/]")
        trajectories = trace_trajectories(trace) if trace else table2_trajectories(row, seed)
        load = workload(trajectories, agents, MODELS[model], hardware, seed)
        hit_tokens = sum(turn.hit_pages for turns in load.agents for turn in turns) * PAGE_TOKENS
        prompt_tokens = sum(turn.prompt_tokens for turns in load.agents for turn in turns)
        console.print(
            f"{setups[names[0]].gpus:,} GPUs, {agents:,} agents, {load.turns:,} turns; stored prefix "
            f"{hit_tokens / prompt_tokens:.1%} of the prompts, {load.hit_bytes / 1e12:,.2f} TB"
        )
        table = Table("mode", box=None, pad_edge=False)
        for column in (
            "JCT s", "speed-up", "TTFT s", "TPOT ms", "P busy", "D busy", "max/avg", "turns/s",
        ):  # fmt: skip
            table.add_column(column, justify="right")
        reference_s = None
        with _Bars() as bars:
            for name, setup in setups.items():
                simulation = Simulation(setup, load, bars.made)
                bars.begin(name, load.turns)
                found = simulation.run_offline()
                reference_s = reference_s or found.jct_s
                table.add_row(
                    name,
                    f"{found.jct_s:,.1f}",
                    f"{reference_s / found.jct_s:.2f}",
                    f"{found.ttft_s:.3f}",
                    f"{found.tpot_s * 1e3:.1f}",
                    f"{found.prefill_storage_busy:.0%}",
                    f"{found.decode_storage_busy:.0%}",
                    f"{found.storage_max_over_mean_total:.2f}",
                    f"{found.turns / found.jct_s:,.1f}",
                )
    console.print(table)
    console.print("busy: share of the run in which storage links of P and D nodes read; max/avg: their bytes")


@sim_app.command("paper")
def compare(
    quick: Annotated[
        bool, typer.Option("--quick", help="A minute, few agents: for development, not to be compared.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Where summary.json goes.")] = Path("results/sim-paper"),
) -> None:
    """The paper's results beside the simulated ones (about 15 minutes of one core)."""
    size = paper.QUICK if quick else paper.FULL

    def note(name: str, value: str) -> None:
        console.print(f"[dim]{name}: {value}[/]")

    begun_s = time.process_time()
    with failures_explained(), _Bars() as bars:
        bench = Bench(bars)
        figures = [
            *paper.offline_660b(bench, size, note),
            *paper.sweep_27b(bench, size, note),
            *paper.pairs_27b(bench, size, note),
            *paper.online(bench, size, note),
        ]
        scale_figure, scale_run = paper.scale(bench, size, note)
        figures.append(scale_figure)
        path = write(figures, out)
        console.print()
        console.print(_comparison(figures))
        console.print(f"* says little about the model: {'; '.join(BY_CONSTRUCTION.values())}")
        rows = absolute.drawn(bench)
        if size.rate_precision is not None:
            rows += absolute.job_completion(bench, tuple(absolute.JCT_S))
            rows += absolute.online(bench, size.rate_precision)
            rows += absolute.append_sweep(bench, absolute.APPEND_AGENTS)
        console.print()
        console.print(_absolute(rows))
        if size.sensitivity_agents:
            turned = variations(bench, size.sensitivity_agents)
            console.print()
            console.print(_sensitivity(turned))
    console.print(
        f"\n{scale_run.gpus:,} GPUs and {scale_run.agents:,} agents ({scale_run.turns:,} turns) simulated in "
        f"{scale_run.cpu_s:.0f} s of one core; everything in {time.process_time() - begun_s:.0f} s"
    )
    console.print(f"{path}")
    if quick:
        console.print("[yellow]--quick: few agents do not saturate storage; compare the full run instead[/]")


def _comparison(figures: list[Figure]) -> Table:
    table = Table("figure", box=None, pad_edge=False)
    for column in ("paper", "simulated", "error", "wanted"):
        table.add_column(column, justify="right")
    table.add_column("")
    for found in figures:
        table.add_row(
            found.name,
            f"{found.paper:.2f}",
            f"{found.simulated:.3f}",
            f"{found.relative_error:+.1%}",
            f"± {found.tolerance:.0%}",
            ("[green]met[/]" if found.is_met else "[red]missed[/]")
            + (" *" if found.name in BY_CONSTRUCTION else ""),
        )
    return table


def _absolute(rows: list[absolute.Absolute]) -> Table:
    table = Table("absolute", box=None, pad_edge=False)
    for column in ("paper", "simulated", "factor"):
        table.add_column(column, justify="right")
    for row in rows:
        factor = f"{row.factor:.2f}" if row.factor is not None else ""
        table.add_row(row.name, row.paper, f"{row.simulated:,.3g}", factor)
    return table


def _sensitivity(turned: list[Variation]) -> Table:
    table = Table("assumption turned", box=None, pad_edge=False)
    for column in ("660B 2P4D speed-up", "27B 1P1D speed-up"):
        table.add_column(column, justify="right")
    for found in turned:
        table.add_row(found.name, f"{found.speedup_660b:.2f}", f"{found.speedup_27b:.2f}")
    return table


class _Bars:
    """A bar for the experiment at hand; on what is no terminal, its name on stderr."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("turns"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()

    def begin(self, name: str, turns: int | None) -> None:
        if self._task is not None:
            self._progress.update(self._task, visible=False)
        if not console.is_terminal:
            errors.print(name)
        self._task = self._progress.add_task(name, total=turns)

    def made(self, turns: int) -> None:
        if self._task is not None:
            self._progress.advance(self._task, turns)


def _mode(name: str) -> Mode:
    """Raises EvalError."""
    if name in MODES:
        return MODES[name]
    placement, slash, path = name.partition("/")
    if not slash:
        raise EvalError(f"mode {name!r} is unknown; choose one of {', '.join(MODES)}, or give PLACEMENT/PATH")
    return Mode(placement, path)


def _positive(option: str, value: float) -> float:
    """Raises EvalError."""
    if not 0 < value < float("inf"):
        raise EvalError(f"--{option} is {value}; give a finite number above 0")
    return value
