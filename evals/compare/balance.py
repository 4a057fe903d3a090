"""`python -m dualpath_sgl.evals.compare.balance`: how evenly the store's pages are read, over all engines of a real cluster.

One cluster with several PEs and DEs (launch/clusters/cpu-2p2d.yaml) behind the placing router plays
the same agents three times: with the `split` path policy and the scheduler's own placement, with
`split` and the paper's placement, and with path and placement in turns (`round_robin`).  The figure
is the paper's (SNIC max/avg): bytes read by the engine that read most, over the mean of all engines;
1 is perfect.

As in the paper, storage is the bottleneck: every engine reads at `--read-rate` at most, the pools are
far smaller than the agents' contexts, and agents take turns, so that nearly every turn needs the store.
All runs use one cluster; each has its own random tokens, so that it finds nothing of the one before,
and every answer is compared with a single server's.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dualpath_sgl.evals.agents.replay import Pace, Replay, replay
from dualpath_sgl.evals.agents.trace import SHIPPED, load_sessions
from dualpath_sgl.evals.agents.workload import Workload, build
from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.common.explained import failures_explained
from dualpath_sgl.evals.common.imbalance import max_over_mean
from dualpath_sgl.evals.compare import measure
from dualpath_sgl.evals.spans import jaeger
from dualpath_sgl.launch.config import CLUSTERS
from dualpath_sgl.launch.config.cluster import ClusterConfig, HostPool, RouterKind, bits_per_s, load
from dualpath_sgl.launch.processes.environment import forget_foreign_tracing
from dualpath_sgl.launch.supervision.cluster import Cluster
from dualpath_sgl.launch.supervision.readiness import require_ready
from dualpath_sgl.launch.supervision.single_server import SingleServer
from dualpath_sgl.terminal.console import errors
from scheduler_svc.policies.placement_policies import DEFAULT_PLACEMENT
from scheduler_svc.telemetry.tracing import init_tracing, shutdown

CLUSTER = CLUSTERS / "cpu-2p2d.yaml"
TRACE = SHIPPED / "claude-code-weka"
OUT = Path("results/balance")
TARGET = 1.1
READ_RATE = "10mbit"
"""Reading what the agents need takes several times what computing it takes."""
POOL_TOKENS = 3072
"""Device pool of each engine; the host pool is half as large again."""
MAX_CONTEXT_TOKENS = 768
SETTLE_TIMEOUT_S = 20.0
POLL_S = 0.2
REPORT_REQUESTS = 20

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Setting:
    name: str
    policy: str
    placement: str
    seed: int


SETTINGS = (
    Setting("split", "split", DEFAULT_PLACEMENT, 1),
    Setting("paper", "split", "paper", 2),
    Setting("round_robin", "round_robin", "round_robin", 3),
)
"""The first is ours, the last what it must beat."""


@dataclass(frozen=True)
class Result:
    name: str
    policy: str
    placement: str
    max_over_mean: float
    store_read_bytes: dict[str, int]
    """By engine."""
    busiest_link: float | None
    """Share of the run in which the engine that read most read at its full rate; None: no limit."""
    job_s: float
    requests: int
    placed_by: dict[str, int]
    """Requests by who chose the engines."""
    fallbacks: dict[str, int]
    duplicate_store_pages: int
    tokens_equal: bool


def balance(counts: dict[str, int]) -> float:
    """Reads of the engine that read most over the mean.  Raises EvalError when nothing was read."""
    if not any(counts.values()):
        raise EvalError(
            "no engine read the store; give more --agents, so that the pools do not hold them all"
        )
    return max_over_mean(counts.values())


def main(
    agents: Annotated[int, typer.Option(min=1, help="Live sessions.")] = 40,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 6,
    turns: Annotated[int, typer.Option(min=1, help="Requests of each session.")] = 3,
    cluster: Annotated[Path, typer.Option(help="Cluster description (YAML).")] = CLUSTER,
    read_rate: Annotated[
        str, typer.Option(help="At which each engine reads the store at most; empty: no limit.")
    ] = READ_RATE,
    out: Annotated[Path, typer.Option(help="Result folder, which is replaced.")] = OUT,
) -> None:
    """Measure and print max/mean of the store reads: scheduler against round robin."""
    forget_foreign_tracing(os.environ)
    with failures_explained():
        config = shrunk(load(cluster), read_rate or None)
        require_ready(config)
        shutil.rmtree(out, ignore_errors=True)
        workload = build(
            load_sessions(TRACE),
            agents=agents,
            turns=turns,
            max_context_tokens=MAX_CONTEXT_TOKENS,
            page_size=config.page_size,
        )
        results = _measure(config, workload, concurrency, out)
    (out / "summary.json").write_text(json.dumps([vars(result) for result in results], indent=2) + "\n")
    _print(results)
    if not all(result.tokens_equal for result in results):
        errors.print("[red]error:[/] tokens differ from the single server's")
        raise typer.Exit(1)


def shrunk(config: ClusterConfig, read_rate: str | None) -> ClusterConfig:
    if config.router.kind is not RouterKind.PLACING:
        raise EvalError("router.kind is rust: that router asks nobody for engines; set it to placing")
    if not config.tracing.enabled:
        raise EvalError("tracing.enabled is false: spans tell who placed a request; set it to true")
    if read_rate is not None:
        try:
            bits_per_s(read_rate)
        except ValueError as error:
            raise EvalError(f"--read-rate is {read_rate!r}: {error}") from error
    pools = {"max_total_tokens": POOL_TOKENS, "host_pool": HostPool(ratio=1.5)}
    groups = {}
    for role in ("prefill", "decode"):
        group = getattr(config, role)
        groups[role] = group.model_copy(update=pools)
    return config.model_copy(
        update={**groups, "store": config.store.model_copy(update={"read_rate": read_rate})}
    )


def _measure(config: ClusterConfig, workload: Workload, concurrency: int, out: Path) -> list[Result]:
    vocab_size = json.loads((config.model.directory() / "config.json").read_text())["vocab_size"]

    def play(url: str, setting: Setting, step: str, collector: str | None) -> Replay:
        tracer = init_tracing("dualpath-client", collector)
        try:
            return replay(
                workload,
                url,
                pace=Pace(concurrency=concurrency),
                vocab_size=vocab_size,
                seed=setting.seed,
                tracer=tracer,
                on_request=_progress(f"{step} {setting.name}", workload.requests),
            )
        finally:
            shutdown()

    with SingleServer(config, out / "single") as server:
        expected = {setting.name: play(server.url, setting, "single server", None) for setting in SETTINGS}
    running = Cluster(config, out / "cluster")
    running.start(console.print)
    results = []
    with running:
        for setting in SETTINGS:
            running.flush_caches()
            running.set_policy(setting.policy, setting.placement)
            before, begun_ns = _counters(running), time.time_ns()
            run = play(running.url, setting, "cluster", running.collector_url)
            counted = _counters(running).since(before)
            limit = config.store.read_rate
            reads = {name: read.store_read_bytes for name, read in sorted(counted.engines.items())}
            results.append(
                Result(
                    name=setting.name,
                    policy=setting.policy,
                    placement=setting.placement,
                    max_over_mean=balance(reads),
                    store_read_bytes=reads,
                    busiest_link=None
                    if limit is None
                    else max(reads.values()) * 8 / bits_per_s(limit) / run.job_s,
                    job_s=run.job_s,
                    requests=len(run.records),
                    placed_by=placed_by(running.spans_path, begun_ns),
                    fallbacks=counted.fallbacks,
                    duplicate_store_pages=counted.duplicate_store_pages or 0,
                    tokens_equal=run.answers == expected[setting.name].answers,
                )
            )
            console.print(f"cluster {setting.name}: max/mean {results[-1].max_over_mean:.3f}")
    return results


def placed_by(spans: Path, begun_ns: int) -> dict[str, int]:
    """Who placed the routed requests that began after `begun_ns` (since 1970)."""
    found: Counter[str] = Counter()
    for trace in jaeger.traces(jaeger.read_lines(spans)):
        for span in trace["spans"]:
            if span["operationName"] == "route" and span["startTime"] * 1000 >= begun_ns:
                tags = {tag["key"]: tag["value"] for tag in span["tags"]}
                found[tags["dualpath.placed_by"]] += 1
    return dict(found)


def _counters(cluster: Cluster) -> measure.Counters:
    """Once every room is closed."""
    deadline_s = time.monotonic() + SETTLE_TIMEOUT_S
    with cluster.ask_scheduler() as client:
        while (status := client.status()).rooms_open and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
    return measure.from_scheduler(status)


def _progress(title: str, requests: int) -> Callable[[object], None]:
    done = 0

    def show(record: object) -> None:
        nonlocal done
        done += 1
        if done % REPORT_REQUESTS == 0 or done == requests:
            console.print(f"{title}: {done} of {requests} requests")

    return show


def _print(results: list[Result]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for result in results:
        table.add_column(f"{result.policy}, placement {result.placement}", justify="right")

    def row(title: str, cell: Callable[[Result], str]) -> None:
        table.add_row(title, *(cell(result) for result in results))

    row("max/mean of store reads", lambda result: f"{result.max_over_mean:.3f}")
    for engine in results[0].store_read_bytes:
        row(f"  {engine}", partial(_read_of, engine))
    row(
        "link of the one that read most, busy",
        lambda result: "-" if result.busiest_link is None else f"{result.busiest_link:.0%}",
    )
    row("requests", lambda result: str(result.requests))
    row("placed by", lambda result: ", ".join(f"{who} {count}" for who, count in result.placed_by.items()))
    row("pages read twice", lambda result: str(result.duplicate_store_pages))
    row("fallbacks", lambda result: str(sum(result.fallbacks.values())))
    row("job completion", lambda result: f"{result.job_s:.1f} s")
    row("tokens equal", lambda result: "yes" if result.tokens_equal else "[red]no[/]")
    console.print(table)
    ours, reference = results[0].max_over_mean, results[-1].max_over_mean
    verdict = "[green]met[/]" if ours <= TARGET and ours < reference else "[red]missed[/]"
    console.print(f"target: {results[0].name} at most {TARGET} and below {results[-1].name}: {verdict}")


if __name__ == "__main__":
    typer.run(main)


def _read_of(engine: str, result: Result) -> str:
    return f"{result.store_read_bytes[engine] / 1e6:.1f} MB"
