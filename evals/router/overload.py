"""`python -m dualpath_sgl.evals.router.overload`: more requests than the engines can answer.

Router and scheduler are the real processes, engines are stand-ins that work for a known time on so many requests at
once (`engines.py`): what saturates them is known.  Requests come at a fixed rate whatever becomes of them, from half to
three times as many as can be answered, and last at half again.  Times are given in multiples of one request's work.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import aiohttp
import typer
from rich.console import Console
from rich.table import Table

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.router.bench import Cluster, running_cluster
from dualpath_sgl.evals.router.engines import Work

RATES = (0.5, 1.0, 1.5, 2.0, 3.0, 0.5)
"""Of what the engines can answer."""
WAITING = 2
"""The queue holds so many times what is answered at once."""
PROMPT_BYTES = 4096

console = Console(highlight=False, soft_wrap=True)


def main(
    seconds: Annotated[float, typer.Option(min=1, help="Of each rate.")] = 10.0,
    at_once: Annotated[int, typer.Option(min=1, help="Requests that the engines work on at once.")] = 16,
    work_s: Annotated[float, typer.Option(min=0.01, help="Of one request.")] = 0.5,
    out: Annotated[Path, typer.Option(help="For the router's log and summary.json.")] = Path(
        "results/router-overload"
    ),
) -> None:
    """Measure a placing router that gets more than its engines can answer."""
    out.mkdir(parents=True, exist_ok=True)
    work = Work(at_once, work_s)
    options = (f"--max-concurrent-requests={at_once}", f"--queue-size={WAITING * at_once}")
    rates: list[dict] = []
    try:
        with running_cluster(1, out, *options, work=work) as cluster:
            for rate in RATES:
                with console.status(f"{rate:g} times what can be answered, {seconds:g} s"):
                    rates.append(asyncio.run(_offer(cluster, rate, work, seconds)))
    except EvalError as error:
        console.print(f"[red]{error}[/]")
        raise typer.Exit(1) from None
    summary = {"at_once": at_once, "waiting": WAITING * at_once, "work_s": work_s, "rates": rates}
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    table = Table("asked", "answered", "sent away", "p50 / p99 of the answered", "router's memory", box=None)
    for found in rates:
        table.add_row(
            f"{found['asked']:.2f}",
            f"{found['answered']:.2f}",
            f"{found['sent_away']:.0%}",
            f"{found['p50']:.1f} / {found['p99']:.1f}",
            f"{found['router_mib']:.0f} MiB",
        )
    console.print(table)
    console.print(
        "Asked and answered: of what the engines can answer.  Times: in multiples of one request's work.\n"
        f"{out / 'summary.json'}"
    )


async def _offer(cluster: Cluster, rate: float, work: Work, seconds: float) -> dict:
    """Raises EvalError for an answer that is neither whole nor a 429 with Retry-After."""
    took_s: list[float] = []
    statuses: Counter[int] = Counter()
    count = max(1, round(rate * work.requests_per_s * seconds))
    body = {"text": "x" * PROMPT_BYTES, "sampling_params": {"max_new_tokens": 1}}

    async def ask(at_s: float) -> None:
        await asyncio.sleep(max(0.0, at_s - time.perf_counter()))
        asked_s = time.perf_counter()
        async with http.post(f"{cluster.url}/generate", json=body) as answer:
            content = await answer.read()
        statuses[answer.status] += 1
        if answer.status == 200:
            took_s.append(time.perf_counter() - asked_s)
        elif answer.status != 429 or "Retry-After" not in answer.headers:
            raise EvalError(f"{cluster.url}/generate answers {answer.status}: {content[:200]!r}")

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        begun_s = time.perf_counter()
        await asyncio.gather(*(ask(begun_s + number * seconds / count) for number in range(count)))
        elapsed_s = time.perf_counter() - begun_s
    return {
        "asked": rate,
        "answered": statuses[200] / elapsed_s / work.requests_per_s,
        "sent_away": statuses[429] / count,
        "p50": statistics.median(took_s) / work.took_s,
        "p99": statistics.quantiles(took_s, n=100)[98] / work.took_s
        if len(took_s) > 1
        else took_s[0] / work.took_s,
        "router_mib": cluster.processes["router"].memory_info().rss / 2**20,
    }


if __name__ == "__main__":
    typer.run(main)
