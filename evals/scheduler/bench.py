"""`python -m dualpath_sgl.evals.scheduler.bench`: how much one scheduler process bears, over loopback ZeroMQ.

Each request is placed, reported by both engines, planned, and done on both: five messages to the
scheduler and three from it.  Each timed measurement is made several times with a new scheduler, and
the median one counts.  Scheduler and generator share the machine: how much of it each of them and
everything else used stands beside the figures.  Latencies are taken in the generator: of a placement from
the time at which its request came (at random, whatever the answers do), of a plan from before the room's
first report, each until it is read.  They are upper bounds of what the scheduler needs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple

import psutil
import typer
from rich.console import Console
from rich.table import Table

from dualpath_sgl.evals.scheduler.load import LoadGenerator

IN_FLIGHT = 256
WARM_UP_S = 2.0
RATE_PER_S = 1000.0
AT_ONCE = 200
"""Requests that come together, once a second, in the measurement of bursts."""
MEMORY_HEARTBEAT_S = 2.5
"""Ten thousand engines a second would be this process's limit; half of their expiry keeps them alive."""
MIB = 1024 * 1024

console = Console(highlight=False, soft_wrap=True)


class Target(NamedTuple):
    name: str
    text: str
    target: float
    at_least: bool

    def is_met(self, value: float) -> bool:
        return value >= self.target if self.at_least else value <= self.target


TARGETS = (
    Target("requests_per_s", "requests/s, each placed + 2 reports + 2 plans + 2 dones", 5000, True),
    Target("plan_p99_ms", "p99 plan latency at 1,000 requests/s, ms", 2.0, False),
    Target("place_p99_ms", "p99 placement latency at 1,000 requests/s, ms", 2.0, False),
    Target(
        "rss_mib_10k_engines_100k_rooms",
        "memory with 10,000 engines and 100,000 live rooms, MiB",
        1024,
        False,
    ),
)


def main(
    seconds: Annotated[float, typer.Option(min=1, help="Of each timed measurement.")] = 8.0,
    engines: Annotated[int, typer.Option(min=2, help="Registered in the timed measurements.")] = 1000,
    memory_engines: Annotated[int, typer.Option(min=2)] = 10_000,
    memory_rooms: Annotated[int, typer.Option(min=1, max=100_000)] = 100_000,
    repeats: Annotated[int, typer.Option(min=1, help="Of each timed measurement; the median counts.")] = 3,
    real_time: Annotated[
        bool,
        typer.Option(
            "--real-time", help="Run scheduler and generator before every other program (needs root)."
        ),
    ] = False,
    out: Annotated[Path, typer.Option(help="Where summary.json goes.")] = Path("results/bench-scheduler"),
) -> None:
    """Measure one scheduler process and print the figures beside their targets."""
    if real_time:
        _go_real_time()
    throughputs = [_throughput(seconds, engines) for _ in range(repeats)]
    latencies = [_latency(seconds, engines) for _ in range(repeats)]
    throughput = _median_run(throughputs, "requests_per_s")
    latency = _median_run(latencies, "plan_p99_ms")
    burst = _latency(seconds, engines, at_once=AT_ONCE)
    memory = _memory(memory_engines, memory_rooms)
    summary = {name: value for run in (throughput, latency) for name, value in run.items() if name != "cores"}
    summary |= memory | {f"burst_{name}": value for name, value in burst.items() if name != "cores"}
    summary |= {"throughput_runs": throughputs, "latency_runs": latencies}
    summary["machine"] = machine_facts(real_time)
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")

    table = Table(box=None, pad_edge=False)
    for column in ("figure", "measured", "target", ""):
        table.add_column(column, justify="left" if column in ("figure", "") else "right")
    for target in TARGETS:
        value = summary[target.name]
        sign = "≥" if target.at_least else "≤"
        verdict = "[green]met[/]" if target.is_met(value) else "[red]missed[/]"
        table.add_row(target.text, f"{value:,.2f}", f"{sign} {target.target:,.0f}", verdict)
    console.print(table)
    console.print(
        f"runs: {_listed(throughputs, 'requests_per_s', '{:,.0f}')} requests/s, "
        f"p99 {_listed(latencies, 'plan_p99_ms', '{:.2f}')} ms; medians count"
    )
    console.print(
        f"at full load: {throughput['scheduler_cpu_us_per_request']:.0f} µs of the scheduler's CPU a "
        f"request; cores used: {_cores(throughput)}"
    )
    console.print(
        f"at {RATE_PER_S:,.0f}/s: p50 {latency['plan_p50_ms']:.2f} ms, "
        f"p99.9 {latency['plan_p999_ms']:.2f} ms; an answer may have lain unread for "
        f"{latency['generator_turn_p99_ms']:.2f} ms (p99); "
        f"cores used: {_cores(latency)}"
    )
    console.print(
        f"placements at {RATE_PER_S:,.0f}/s: p50 {latency['place_p50_ms']:.2f} ms, "
        f"p99.9 {latency['place_p999_ms']:.2f} ms; with {AT_ONCE} more at once each second: placement p99 "
        f"{burst['place_p99_ms']:.2f} ms, plan p99 {burst['plan_p99_ms']:.2f} ms, {burst['refused']} refused"
    )
    if real_time:
        console.print("scheduler and generator ran in the real-time class: other programs had what they left")
    console.print(f"{out / 'summary.json'}")


def _go_real_time() -> None:
    """For this process and those it starts: what other programs do then costs the figures little."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except PermissionError:
        raise typer.BadParameter("needs root", param_hint="--real-time") from None


def _median_run(runs: list[dict], name: str) -> dict:
    """The run in the middle; of an even number the lower one."""
    return sorted(runs, key=lambda run: run[name])[(len(runs) - 1) // 2]


def _listed(runs: list[dict], name: str, form: str) -> str:
    return ", ".join(form.format(run[name]) for run in runs)


def _cores(run: dict) -> str:
    used = run["cores"]
    return (
        f"scheduler {used['scheduler']:.2f}, generator {used['generator']:.2f}, "
        f"other processes {used['other']:.2f} of {os.cpu_count()}"
    )


@contextmanager
def running_scheduler() -> Iterator[tuple[psutil.Process, str]]:
    """A scheduler process as `dualpath up` starts it, and its address."""
    command = [sys.executable, "-m", "scheduler_svc", "--bind=tcp://127.0.0.1:0", "--metrics-port=0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None, "both are pipes"
    try:
        ready = process.stdout.readline()
        if not ready:
            raise SystemExit(f"the scheduler did not start: {process.stderr.read()}")
        yield psutil.Process(process.pid), ready.split()[-1]
    finally:
        process.kill()
        process.communicate()


@contextmanager
def _loaded(engines: int, heartbeat_s: float = 1.0) -> Iterator[tuple[psutil.Process, LoadGenerator]]:
    with running_scheduler() as (process, address):
        generator = LoadGenerator(address, engines, heartbeat_s)
        try:
            generator.register()
            yield process, generator
        finally:
            generator.close()


@contextmanager
def _progress(title: str, unit: str) -> Iterator[Callable[[int], None]]:
    """A line of progress, at most twice a second."""
    shown_s = time.monotonic()
    with console.status(title) as status:

        def show(count: int) -> None:
            nonlocal shown_s
            if (now_s := time.monotonic()) - shown_s > 0.5:
                shown_s = now_s
                status.update(f"{title}: {count:,} {unit}")

        yield show
    console.print(f"{title}: done")


def _throughput(seconds: float, engines: int) -> dict:
    with (
        _progress(f"throughput, {engines:,} engines", "requests") as show,
        _loaded(engines) as (process, generator),
    ):
        generator.run_for(WARM_UP_S, IN_FLIGHT, show)
        with _cpu_of(process) as cores:
            rate = generator.run_for(seconds, IN_FLIGHT, show)
        return {
            "requests_per_s": rate,
            "scheduler_cpu_us_per_request": cores["scheduler"] / rate * 1e6,
            "cores": cores,
        }


def _latency(seconds: float, engines: int, at_once: int = 0) -> dict:
    title = f"latency at {RATE_PER_S:,.0f} requests/s, {engines:,} engines"
    if at_once:
        title += f", {at_once} more at once each second"
    with _progress(title, "requests") as show, _loaded(engines) as (process, generator):
        generator.run_at(RATE_PER_S, WARM_UP_S, show)
        for times_s in (generator.latencies_s, generator.places_s, generator.turns_s):
            times_s.clear()
        with _cpu_of(process) as cores:
            generator.run_at(RATE_PER_S, seconds, show, at_once)
        return {
            **_percentiles_ms("plan", generator.latencies_s),
            **_percentiles_ms("place", generator.places_s),
            "refused": generator.refused,
            "generator_turn_p99_ms": statistics.quantiles(generator.turns_s, n=100)[98] * 1e3,
            "cores": cores,
        }


def _percentiles_ms(name: str, times_s: list[float]) -> dict[str, float]:
    found = statistics.quantiles(times_s, n=1000)
    return {f"{name}_p{label}_ms": found[at] * 1e3 for label, at in ((50, 499), (99, 989), (999, 998))}


@contextmanager
def _cpu_of(process: psutil.Process) -> Iterator[dict[str, float]]:
    """Filled at the end: cores that the scheduler, this process and all others used meanwhile."""
    cores: dict[str, float] = {}
    before, begun_s = _cpu_s(process), time.monotonic()
    yield cores
    elapsed_s = time.monotonic() - begun_s
    used = [(now - then) / elapsed_s for now, then in zip(_cpu_s(process), before, strict=True)]
    cores |= {"scheduler": used[0], "generator": used[1], "other": max(0.0, used[2] - used[0] - used[1])}


def _cpu_s(process: psutil.Process) -> tuple[float, float, float]:
    """CPU seconds so far: the scheduler's, this process's, the whole machine's."""
    scheduler, own, machine = process.cpu_times(), psutil.Process().cpu_times(), psutil.cpu_times()
    return (
        scheduler.user + scheduler.system,
        own.user + own.system,
        sum(machine) - machine.idle - machine.iowait,
    )


def _memory(engines: int, rooms: int) -> dict[str, float]:
    title = f"memory, {engines:,} engines and {rooms:,} rooms"
    with _progress(title, "rooms") as show, _loaded(engines, MEMORY_HEARTBEAT_S) as (process, generator):
        generator.fill(rooms, IN_FLIGHT, show)
        return {"rss_mib_10k_engines_100k_rooms": process.memory_info().rss / MIB}


def machine_facts(real_time: bool) -> dict[str, str | int | float]:
    return {
        "cores": os.cpu_count() or 1,
        "real_time": real_time,
        "load_average": os.getloadavg()[0],
        "python": sys.version.split()[0],
    }


if __name__ == "__main__":
    typer.run(main)
