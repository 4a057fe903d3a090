"""`python -m dualpath_sgl.evals.router.bench`: how many requests one placing router bears, and what one costs it.

Router and scheduler are the real processes.  Engines are stand-ins that answer at once
(`engines.py`), because only the router is measured: a real engine would take longer for one
request than the router for hundreds.  All of it shares the machine, so requests a second are a lower
bound of what a router does alone; its CPU time a request does not depend on the others much.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple

import aiohttp
import psutil
import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.router import engines
from dualpath_sgl.evals.scheduler.bench import machine_facts, running_scheduler
from dualpath_sgl.launch.processes.ports import FreePorts
from dualpath_sgl.launch.processes.process import ManagedProcess
from scheduler_svc.wire.protocol import Role

START_TIMEOUT_S = 180.0
"""The router takes long to start: it imports SGLang."""
WARM_UP_S = 2.0
PROMPT_BYTES = 4096

console = Console(highlight=False, soft_wrap=True)


class Cluster(NamedTuple):
    url: str
    processes: Mapping[str, psutil.Process]
    """`router`, `scheduler`, `engines` and `clients`, which is this one."""


def main(
    seconds: Annotated[float, typer.Option(min=1, help="Of each measurement.")] = 8.0,
    clients: Annotated[int, typer.Option(min=1, help="Each sends its next request after an answer.")] = 64,
    pairs: Annotated[int, typer.Option(min=1, help="Prefill and decode engines, each as many.")] = 2,
    out: Annotated[Path, typer.Option(help="For the router's log and summary.json.")] = Path(
        "results/bench-router"
    ),
) -> None:
    """Measure one placing router in front of stand-in engines."""
    out.mkdir(parents=True, exist_ok=True)
    table = Table("answers", "requests/s", "router's CPU a request", "p50 / p99", box=None)
    summary: dict = {"machine": machine_facts(real_time=False), "clients": clients, "pairs": pairs}
    try:
        with running_cluster(pairs, out) as cluster:
            for title, stream in (("whole", False), ("streamed", True)):
                with console.status(f"{title} answers, {seconds:g} s"):
                    found = summary[title] = asyncio.run(_measure(cluster, clients, seconds, stream))
                used = ", ".join(f"{name} {cores:.2f}" for name, cores in found["cores"].items())
                console.print(f"{title} answers: done; cores used: {used} of {os.cpu_count()}")
                table.add_row(
                    title,
                    f"{found['requests_per_s']:,.0f}",
                    f"{found['router_cpu_us_per_request']:,.0f} µs",
                    f"{found['p50_ms']:.1f} / {found['p99_ms']:.1f} ms",
                )
    except EvalError as error:
        console.print(f"[red]{error}[/]")
        raise typer.Exit(1) from None
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    console.print(table)
    console.print(
        f"{clients} clients; streamed answers have {engines.EVENTS} events, which come all at once; "
        f"every request was placed by the scheduler\n{out / 'summary.json'}"
    )


@contextmanager
def running_cluster(
    pairs: int, folder: Path, *options: str, work: engines.Work | None = None
) -> Iterator[Cluster]:
    """Scheduler, stand-in engines and a router, with these options, that takes requests.  Raises EvalError."""
    with ExitStack() as running:
        scheduler, address = running.enter_context(running_scheduler())
        stand_ins, urls = running.enter_context(_running_engines(address, pairs, work))
        router, url = running.enter_context(_running_router(address, urls, folder / "router.log", *options))
        processes = {
            "router": psutil.Process(router.pid),
            "scheduler": scheduler,
            "engines": stand_ins,
            "clients": psutil.Process(),
        }
        with console.status("the router starts: it imports SGLang"):
            asyncio.run(_wait_until_placing(router, url))
        yield Cluster(url, processes)


@contextmanager
def _running_engines(
    scheduler: str, pairs: int, work: engines.Work | None
) -> Iterator[tuple[psutil.Process, list[tuple[Role, str]]]]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=engines.serve, args=(scheduler, pairs, there, work), daemon=True)
    process.start()
    there.close()  # so that its end is noticed here
    try:
        yield psutil.Process(process.pid), here.recv()
    except EOFError:
        raise EvalError("the stand-in engines did not start; their error is above") from None
    finally:
        process.kill()
        process.join()


@contextmanager
def _running_router(
    scheduler: str, engines: list[tuple[Role, str]], log: Path, *options: str
) -> Iterator[tuple[ManagedProcess, str]]:
    port = FreePorts("127.0.0.1").take()
    argv = [
        *(sys.executable, "-m", "sglang_router.launch_router", "--pd-disaggregation", "--mini-lb"),
        *(f"--dualpath-scheduler={scheduler}", "--host=127.0.0.1", f"--port={port}", *options),
    ]
    for role, url in engines:
        argv += ["--prefill", url, "9000"] if role is Role.PREFILL else ["--decode", url]
    process = ManagedProcess("router", argv, os.environ, log)
    process.start()
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.finish(0)


async def _wait_until_placing(router: ManagedProcess, url: str) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    async with aiohttp.ClientSession() as http:
        while True:
            if not router.running or time.monotonic() > deadline_s:
                raise EvalError(f"the router does not take requests ({router.log_path}):\n{router.tail()}")
            try:
                await _ask(http, url, stream=False)
                if (await _placements(http, url)).get("scheduler"):
                    return
            except (aiohttp.ClientError, EvalError):
                pass
            await asyncio.sleep(0.2)


async def _measure(cluster: Cluster, clients: int, seconds: float, stream: bool) -> dict:
    """Raises EvalError when a request fails, or is not placed by the scheduler."""
    took_s: list[float] = []

    async def client(until_s: float) -> None:
        while (begun_s := time.perf_counter()) < until_s:
            await _ask(http, cluster.url, stream)
            took_s.append(time.perf_counter() - begun_s)

    async def load(duration_s: float) -> None:
        took_s.clear()
        until_s = time.perf_counter() + duration_s
        await asyncio.gather(*(client(until_s) for _ in range(clients)))

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        await load(WARM_UP_S)
        placed, cpu_s, begun_s = await _placements(http, cluster.url), _cpu_s(cluster), time.perf_counter()
        await load(seconds)
        elapsed_s = time.perf_counter() - begun_s
        used_s = {name: now - cpu_s[name] for name, now in _cpu_s(cluster).items()}
        now_placed = await _placements(http, cluster.url)
    if now_placed.get("router", 0) > placed.get("router", 0):
        raise EvalError(
            "the scheduler did not answer in time, so the router placed requests by itself: what was "
            "measured is not placement; try fewer --clients"
        )
    return {
        "requests_per_s": len(took_s) / elapsed_s,
        "router_cpu_us_per_request": used_s["router"] / len(took_s) * 1e6,
        "p50_ms": statistics.median(took_s) * 1e3,
        "p99_ms": statistics.quantiles(took_s, n=100)[98] * 1e3,
        "cores": {name: used / elapsed_s for name, used in used_s.items()},
    }


async def _ask(http: aiohttp.ClientSession, url: str, stream: bool) -> None:
    body = {"text": "x" * PROMPT_BYTES, "stream": stream, "sampling_params": {"max_new_tokens": 16}}
    async with http.post(f"{url}/generate", json=body) as answer:
        content = await answer.read()
        if answer.status != 200 or b'"error"' in content:
            raise EvalError(f"{url}/generate answers {answer.status}: {content[:200]!r}")


async def _placements(http: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """Requests by who placed them."""
    async with http.get(f"{url}/metrics") as answer:
        families = text_string_to_metric_families(await answer.text())
    return {
        sample.labels["placed_by"]: sample.value
        for family in families
        for sample in family.samples
        if sample.name == "dualpath_router_placements_total"
    }


def _cpu_s(cluster: Cluster) -> dict[str, float]:
    times = {name: process.cpu_times() for name, process in cluster.processes.items()}
    return {name: used.user + used.system for name, used in times.items()}


if __name__ == "__main__":
    typer.run(main)
