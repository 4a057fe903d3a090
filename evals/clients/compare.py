"""The whole run: a single server, then a cluster behind each router; every client asks all three the same."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from dualpath_sgl.evals.agents.sessions import forget_caches, generate
from dualpath_sgl.evals.clients import aiperf, benchmarks
from dualpath_sgl.evals.clients.curl import PATHS, curl
from dualpath_sgl.evals.clients.outcome import Outcome
from dualpath_sgl.evals.clients.routers import placing_router
from dualpath_sgl.evals.clients.sdks import sdk
from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.launch.config.cluster import ClusterConfig, Mode, Router, RouterKind
from dualpath_sgl.launch.supervision.cluster import Cluster
from dualpath_sgl.launch.supervision.single_server import SingleServer

AT_ONCE = 3
"""Clients that ask one server at the same time: most of their time goes into starting."""
WRITTEN = ("single-server", "cluster", "clients", "summary.json", "report.md")
"""What a run leaves in its folder."""
Client = Callable[[str, Path], Outcome]
"""Asks the server at a URL; its files go into the folder."""


class Row(NamedTuple):
    """One line of summary.json."""

    client: str
    router: str
    ok: bool
    requests: int
    tokens_equal: bool | None
    """To the single server's; None where the client does not tell what was answered, or got nothing."""


class Compared(NamedTuple):
    row: Row
    remark: str
    """Why it did not go well, or where the first difference is."""


def clients(model: Path, programs: Path, multiturn: Path | None) -> dict[str, Client]:
    """By name.  `model`: the served model's folder; `programs`: of the clients' environment; `multiturn`:
    SGLang's bench_multiturn.py, if it is at hand."""
    found: dict[str, Client] = {f"curl {path}": partial(curl, path) for path in PATHS}
    for form in benchmarks.FORMS:
        found[form] = partial(benchmarks.bench_serving, form, model)
    if multiturn is not None:
        found["bench_multiturn"] = partial(benchmarks.bench_multiturn, multiturn.absolute(), model)
    for name, topic in (("openai", "chat"), ("openai echo", "echo"), ("openai responses", "responses")):
        found[name] = partial(sdk, "sdk_openai", [topic], sys.executable)
    found["anthropic"] = partial(sdk, "sdk_anthropic", [], str(programs / "python"))
    for form in aiperf.FORMS:
        found[form] = partial(aiperf.aiperf, form, programs, model)
    return found


def compare(
    config: ClusterConfig, asking: Mapping[str, Client], out: Path, console: Console
) -> list[Compared]:
    """Raises EvalError.  `out`: an empty folder for results and logs."""
    if config.mode in (Mode.BASIC, Mode.BOTH):
        raise EvalError(f"mode is {config.mode}: it has no placing router; take a cluster of DualPath's")
    config = config.model_copy(update={"router": Router(kind=RouterKind.RUST)})
    with SingleServer(config, _folder(out, "single-server")) as server:
        right = _ask_all("single server", server.url, asking, out, console)
    results: list[Compared] = []
    with Cluster(config, _folder(out, "cluster")) as cluster, placing_router(cluster) as placing:
        for router, url in (("rust", cluster.url), ("placing", placing)):
            generate(url, [1, 2, 3, 4])
            forget_caches(cluster)
            outcomes = _ask_all(router, url, asking, out, console)
            results += [_compared(name, router, right[name], outcome) for name, outcome in outcomes.items()]
    return results


def write(results: list[Compared], out: Path) -> None:
    rows = [result.row._asdict() for result in results]
    (out / "summary.json").write_text(json.dumps(rows, indent=2) + "\n")
    lines = ["| client | router | ok | requests | tokens equal | remark |", "|---|---|---|---|---|---|"]
    for row, remark in results:
        equal = {True: "yes", False: "no", None: "-"}[row.tokens_equal]
        remark = " ".join(remark.split()).replace("|", "\\|")
        lines.append(
            f"| {row.client} | {row.router} | {'yes' if row.ok else 'no'} | {row.requests} | {equal} | {remark} |"
        )
    (out / "report.md").write_text("\n".join(lines) + "\n")


def chosen(asking: dict[str, Client], names: str) -> dict[str, Client]:
    """Those with the comma-separated names; all without any.  Raises EvalError."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in asking]:
        raise EvalError(f"no client {unknown[0]!r}; choose from {', '.join(asking)}")
    return {name: asking[name] for name in wanted} if wanted else asking


def fresh(out: Path) -> Path:
    """An empty folder in place of an earlier run's.  Raises EvalError when it holds something else."""
    if out.exists():
        if foreign := sorted(path.name for path in out.iterdir() if path.name not in WRITTEN):
            raise EvalError(f"out is {out}, which holds {foreign[0]}: name another folder, or remove it")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    return out.absolute()


def _folder(out: Path, name: str) -> Path:
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _ask_all(
    server: str, url: str, asking: Mapping[str, Client], out: Path, console: Console
) -> dict[str, Outcome]:
    def ask(name: str) -> Outcome:
        folder = _folder(
            out, f"clients/{server.replace(' ', '-')}/{name.replace('/', '-').replace(' ', '-')}"
        )
        outcome = asking[name](url, folder)
        said = f"{outcome.requests} requests" if outcome.ok else f"failed: {outcome.problem[:200]}"
        console.print(f"{server}: {name}: {said}", markup=False)
        return outcome

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(asking, pool.map(ask, asking), strict=True))


def _compared(client: str, router: str, right: Outcome, outcome: Outcome) -> Compared:
    different = [name for name, answer in right.answers.items() if outcome.answers.get(name) != answer]
    equal = None if not right.answers or not outcome.answers else not different
    if not right.ok:
        remark = f"the single server does not answer it either: {right.problem}"
    elif not outcome.ok:
        remark = outcome.problem
    elif different:
        remark = f"{len(different)} of {len(right.answers)} differ, the first: {different[0]}"
    else:
        remark = ""
    return Compared(Row(client, router, outcome.ok and right.ok, outcome.requests, equal), remark)
