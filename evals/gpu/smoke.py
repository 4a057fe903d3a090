"""The whole system on the GPUs at hand: every token compared with one server's, and load times.

    python -m dualpath_sgl.evals.gpu.smoke --out runs/smoke              # two GPUs
    python -m dualpath_sgl.evals.gpu.smoke --out runs/smoke --one-gpu    # every engine on GPU 0

after `dualpath setup cuda`.

1. One plain SGLang server plays a few sessions with its prefix cache, and again without one.
2. The cluster plays them under every path policy, one request at a time, all engines' own caches
   emptied before each turn, so that every turn is read from the store; then with the decode engine's
   pool kept, and with all sessions at once.  Answers must equal those of the server with its cache.
3. Load times of prompts that the store holds, alone and in a burst, per path policy, and how fast
   pages leave a decode engine's memory (`evals/gpu/goodput.py`); then upstream's load times
   (`mode: basic`) on a cluster of its own (`evals/gpu/loads.py`).

Engines read the store at `store.read_rate` at most, which makes it the bottleneck that load paths are
about.  Loads also pay for the transfer of KV from prefill to decode engine wherever the decode engine
did not read the pages itself: the store must be well below that, or the ratios say little.

bfloat16 answers depend on the batch's shape: near ties of a random model flip, also between the two
plays of 1.  `--enable-deterministic-inference` (triton attention) makes equal work give equal tokens;
without it only the load times mean anything.  With a torch older than SGLang pins, give `-c` a copy of the
cluster file whose groups have `env: {SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK: "1",
SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND: python}`.

`--out` gets `summary.json` (written after every step), `tables.md`, logs and spans.  The exit status
is 1 when an answer differs or a step fails.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path as FilePath
from typing import Annotated

import typer

from dualpath_sgl.evals.agents.sessions import (
    TURNS,
    Session,
    flush,
    forget_caches,
    play_all,
    reads,
    wait_until_persisted,
)
from dualpath_sgl.evals.gpu.goodput import Goodput, beside_mooncake, forwards
from dualpath_sgl.evals.gpu.loads import (
    BURST_POLICIES,
    RESIDENT_POLICY,
    Cell,
    Expected,
    LoadMeter,
    LoadPlan,
    cell_name,
)
from dualpath_sgl.evals.gpu.report import stage_times, tables
from dualpath_sgl.evals.spans import jaeger
from dualpath_sgl.launch.config import CLUSTERS
from dualpath_sgl.launch.config.cluster import ClusterConfig, Group, Mode, load
from dualpath_sgl.launch.supervision.cluster import Cluster
from dualpath_sgl.launch.supervision.single_server import SingleServer

CONFIG = CLUSTERS / "gpu-smoke.yaml"
SESSIONS = ("ada", "bob", "eve")

Answers = dict[str, list[list[int]]]


class Record:
    """Results so far, on disk after every step."""

    def __init__(self, out: FilePath):
        self.out = out
        self.content: dict[str, dict] = {}
        self.begun_s = time.monotonic()
        out.mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.begun_s:6.1f} s  {text}", flush=True)

    def put(self, section: str, name: str, value) -> None:
        self.content.setdefault(section, {})[name] = value
        (self.out / "summary.json").write_text(json.dumps(self.content, indent=1))
        self.say(f"{section} {name}: {json.dumps(value)[:600]}")


def fresh_sessions(prompt_tokens: int) -> list[Session]:
    """`prompt_tokens`: of each first prompt."""
    return [Session(name, prompt_tokens) for name in SESSIONS]


def sequential(url: str, prompt_tokens: int, before_turn: Callable[[], None] = lambda: None) -> Answers:
    """One session after the other, one request at a time."""
    sessions = fresh_sessions(prompt_tokens)
    for session in sessions:
        for turn in range(TURNS):
            before_turn()
            session.play(url, turn)
    return {session.name: session.answers for session in sessions}


def difference(answers: Answers, reference: Answers) -> dict:
    """How many answers differ; only a session's first differing answer had an equal prompt."""
    turns = [(name, turn) for name in reference for turn in range(TURNS)]
    unequal = [(name, turn) for name, turn in turns if answers[name][turn] != reference[name][turn]]
    first: dict[str, list[int]] = {}
    for name, turn in unequal:
        pair = zip(answers[name][turn], reference[name][turn], strict=True)
        first.setdefault(name, [turn, next(index for index, (a, b) in enumerate(pair) if a != b)])
    return {
        "equal": not unequal,
        "unequal_answers": len(unequal),
        "of": len(turns),
        "first_turn_and_token": first,
    }


def counted(cluster: Cluster) -> dict:
    found = reads(cluster)
    return {
        "prefill_store_MB": round(found.prefill_store_bytes / 1e6, 1),
        "decode_store_MB": round(found.decode_store_bytes / 1e6, 1),
        "forwarded_MB": round(found.forwarded_bytes / 1e6, 1),
        "paths": {path.value: count for path, count in found.paths.items()},
        "fallbacks": found.fallbacks,
        "duplicate_store_pages": found.duplicate_store_pages,
    }


def run_tokens(
    record: Record, cluster: Cluster, policies: list[str], prompt_tokens: int, reference: Answers
) -> bool:
    """Whether all answers are the reference's."""
    equal = []

    def compare(name: str, answers: Answers) -> None:
        found = difference(answers, reference)
        equal.append(found["equal"])
        record.put("tokens", name, {**found, "reads": counted(cluster)})

    for policy in policies:
        cluster.set_policy(policy)
        compare(policy, sequential(cluster.url, prompt_tokens, lambda: forget_caches(cluster)))
    cluster.set_policy("decode")
    compare(
        "decode, its pool kept",
        sequential(cluster.url, prompt_tokens, lambda: forget_caches(cluster, "prefill")),
    )
    cluster.set_policy(policies[-1])
    sessions = fresh_sessions(prompt_tokens)
    for turn in range(TURNS):
        forget_caches(cluster)
        play_all(cluster.url, sessions, turn)
    compare(f"{policies[-1]}, sessions at once", {session.name: session.answers for session in sessions})
    return all(equal)


def run_loads(
    record: Record, cluster: Cluster, plan: LoadPlan, cells: dict[str, Cell], expected: Expected
) -> None:
    """Fill the cluster's store and measure every cell that the cluster's mode has."""

    def add(cell: Cell) -> None:
        cells[cell.name] = cell
        record.put("loads", cell.name, asdict(cell))

    meter = LoadMeter(cluster, plan, expected, add)
    meter.fill(lambda: wait_until_persisted(cluster))
    record.say("the store holds every prompt")
    if cluster.config.mode is Mode.DECODE_SIDE:
        meter.dualpath()
    else:
        meter.upstream()


def beside_raw(record: Record, cluster: Cluster, cells: dict[str, Cell]) -> list[Goodput]:
    """Mooncake alone, with the bytes of every resident load; the cluster idles meanwhile."""
    found = []
    page_bytes = cluster.config.page_size * cluster.kv_bytes_per_token
    for cell in cells.values():
        if cell.load == "resident":
            found.append(beside_mooncake(cell, cluster.config.host, page_bytes))
            record.put("goodput", str(cell.tokens), asdict(found[-1]))
    return found


def add_forwards(record: Record, cluster: Cluster, cells: dict[str, Cell], goodputs: list[Goodput]) -> None:
    """Add the forwards of a stopped cluster's resident loads: engines export their last spans at the end."""
    for goodput in goodputs:
        cell = cells[cell_name(RESIDENT_POLICY, "resident", goodput.tokens)]
        goodput.forwards = forwards(cluster.spans_path, cell.window_ns)
        record.put("goodput", str(cell.tokens), asdict(goodput))


def add_stages(record: Record, cluster: Cluster, cells: dict[str, Cell]) -> None:
    """Add the stage times of a stopped cluster's lone loads: engines export their last spans at the end."""
    traces = jaeger.traces(jaeger.read_lines(cluster.spans_path))
    for cell in cells.values():
        if cell.load == "lone" and not cell.stages_s:
            cell.stages_s = stage_times(traces, cell.window_ns)
            record.put("loads", cell.name, asdict(cell))


def with_decode_engines(description: ClusterConfig, count: int) -> ClusterConfig:
    decode = description.decode.model_copy(update={"count": count})
    return description.model_copy(update={"decode": decode})


def on_one_gpu(description: ClusterConfig) -> ClusterConfig:
    """Every engine on GPU 0."""

    def placed(group: Group) -> Group:
        return group.model_copy(update={"extra_args": (*group.extra_args, "--base-gpu-id=0")})

    groups = {"prefill": placed(description.prefill), "decode": placed(description.decode)}
    return description.model_copy(update=groups)


def main(
    out: Annotated[FilePath, typer.Option("--out", help="Directory of results, logs and spans.")],
    config: Annotated[
        FilePath, typer.Option("--config", "-c", help="Cluster description, mode decode-side.")
    ] = CONFIG,
    one_gpu: Annotated[bool, typer.Option("--one-gpu", help="Put every engine on GPU 0.")] = False,
    policies: Annotated[
        str, typer.Option(help="Path policies whose tokens are compared, comma-separated.")
    ] = "prefill,decode,round_robin,split",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="First prompt of a session.")] = 3000,
    lengths: Annotated[
        str, typer.Option(help="Prompt lengths of the lone loads, comma-separated; empty: none.")
    ] = "8192,16384,32768",
    repetitions: Annotated[int, typer.Option(min=1, help="Of each lone load.")] = 5,
    burst_requests: Annotated[int, typer.Option(min=0, help="Prompts of a burst; 0: no bursts.")] = 8,
    burst_tokens: Annotated[int, typer.Option(min=1, help="Length of each.")] = 8192,
    burst_repetitions: Annotated[int, typer.Option(min=1, help="Of each burst.")] = 1,
    burst_policies: Annotated[
        str, typer.Option(help="Path policies of the bursts, comma-separated; upstream's is always there.")
    ] = ",".join(BURST_POLICIES),
    held: Annotated[bool, typer.Option(help="Also measure prompts that nobody has to load.")] = True,
    resident_lengths: Annotated[
        str,
        typer.Option(help="Prompt lengths of forwards out of a decode engine's memory; empty: none."),
    ] = "8192,16384,32768",
    decode_engines: Annotated[
        int | None, typer.Option(min=1, help="How many; by default as the cluster description says.")
    ] = None,
) -> None:
    """Compare tokens on every path with one server's, and time loads beside upstream's."""
    description: ClusterConfig = load(config)
    if one_gpu:
        description = on_one_gpu(description)
    if decode_engines is not None:
        description = with_decode_engines(description, decode_engines)
    names = policies.split(",")
    plan = LoadPlan(
        _numbers(lengths),
        repetitions,
        burst_requests,
        burst_tokens,
        burst_repetitions,
        _known(burst_policies),
        held,
        _numbers(resident_lengths),
        description.decode.count,
    )
    record = Record(out)
    with SingleServer(description, out / "single") as server:
        record.say("the single server is up")
        reference = sequential(server.url, prompt_tokens)
        uncached = sequential(server.url, prompt_tokens, lambda: flush(server.url))
        record.put("tokens", "single server without cache", difference(uncached, reference))
    cells: dict[str, Cell] = {}
    expected: Expected = {}
    goodputs: list[Goodput] = []
    cluster = Cluster(description, out / "dualpath")
    cluster.start(record.say)
    with cluster:
        equal = run_tokens(record, cluster, names, prompt_tokens, reference)
        if plan.anything:
            run_loads(record, cluster, plan, cells, expected)
            goodputs = beside_raw(record, cluster, cells)
    if plan.anything:
        add_stages(record, cluster, cells)
        add_forwards(record, cluster, cells, goodputs)
        if plan.lengths or plan.burst_requests:
            upstream = Cluster(description.model_copy(update={"mode": Mode.BASIC}), out / "basic")
            upstream.start(record.say)
            with upstream:
                run_loads(record, upstream, plan, cells, expected)
            add_stages(record, upstream, cells)
        text = tables(cells, plan, goodputs)
        (out / "tables.md").write_text(text)
        print(text)
    different = [name for name, cell in cells.items() if not cell.equal_answers]
    if different:
        print(f"loads whose answers differ from the first ones: {', '.join(different)}", file=sys.stderr)
    if not equal:
        print("answers differ from the single server's", file=sys.stderr)
    if different or not equal:
        raise typer.Exit(1)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        raise typer.BadParameter(f"{text!r}: give whole numbers, such as 8192,16384") from None


def _known(policies: str) -> tuple[str, ...]:
    names = tuple(policies.split(","))
    if unknown := [name for name in names if name not in BURST_POLICIES]:
        raise typer.BadParameter(f"{', '.join(unknown)}: choose among {', '.join(BURST_POLICIES)}")
    return names


if __name__ == "__main__":
    typer.run(main)
