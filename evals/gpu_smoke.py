"""The whole system on the GPUs at hand: every token compared with one server's, and load times.

    python -m evals.gpu_smoke -c launch/clusters/gpu-1p1d.yaml --out runs/smoke

from a source checkout with `requirements/cuda.txt` installed and `dualpath patch apply` done.

1. One plain SGLang server plays a few sessions with its prefix cache, and again without one.
2. The cluster plays them under every path policy, one request at a time, all engines' own caches
   emptied before each turn, so that every turn is read from the store; then with the decode engine's
   pool kept, and with all sessions at once.  Answers must equal those of the server with its cache.
3. Lone prompts that the store holds: time to the first token per policy and length.

bfloat16 answers depend on the batch's shape: near ties of a random model flip, also between the two
plays of 1.  `extra_args: [..., --enable-deterministic-inference]` (triton attention) makes equal
work give equal tokens; without it only the load times mean anything.

Both engines fit on one GPU: give both groups `max_total_tokens: 65536`, `host_pool: {ratio: 2}` and
`extra_args: [..., --mem-fraction-static=0.3, --base-gpu-id=0]`.  With a torch older than SGLang pins,
set SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK=1 and SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND=python.

`--out` gets `summary.json` (written after every step), `table.md`, logs and spans.  The exit status
is 1 when an answer differs or a step fails.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Annotated

import typer

# The end-to-end tests' vocabulary of sessions that grow with what the model really answered.
sys.path.insert(0, str(FilePath(__file__).resolve().parents[1] / "tests" / "e2e"))

import agents
from agents import (
    TURNS,
    Session,
    flush,
    forget_caches,
    play_all,
    reads,
    wait_until_persisted,
)

from launch.config import ClusterConfig, load
from launch.supervisor import Cluster, single_server

SESSIONS = ("ada", "bob", "eve")
REQUEST_TIMEOUT_S = 120.0

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


def sequential(url: str, before_turn: Callable[[], None] = lambda: None) -> Answers:
    """One session after the other, one request at a time."""
    sessions = [Session(name) for name in SESSIONS]
    for session in sessions:
        for turn in range(TURNS):
            before_turn()
            session.play(url, turn)
    return {session.name: session.answers for session in sessions}


def difference(answers: Answers, reference: Answers) -> dict:
    """How many answers differ; only a session's first differing answer had an equal prompt."""
    turns = [(name, turn) for name in reference for turn in range(TURNS)]
    unequal = [(name, turn) for name, turn in turns if answers[name][turn] != reference[name][turn]]
    first = {}
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


def first_token_s(url: str, prompt: list[int]) -> tuple[float, int]:
    """Seconds until the answer of one token, and how many prompt tokens were cached."""
    sampling = {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}
    data = json.dumps({"input_ids": prompt, "sampling_params": sampling}).encode()
    request = urllib.request.Request(f"{url}/generate", data, {"Content-Type": "application/json"})
    begun_s = time.perf_counter()
    with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as answer:
        reply = json.load(answer)
    return time.perf_counter() - begun_s, reply.get("meta_info", {}).get("cached_tokens", -1)


def prompt_of(tokens: int, seed: str) -> list[int]:
    rng = random.Random(f"load/{tokens}/{seed}")
    return [rng.randrange(250) for _ in range(tokens)]


def run_tokens(record: Record, cluster: Cluster, policies: list[str], reference: Answers) -> bool:
    """Whether all answers are the reference's."""
    equal = []

    def compare(name: str, answers: Answers) -> None:
        found = difference(answers, reference)
        equal.append(found["equal"])
        record.put("tokens", name, {**found, "reads": counted(cluster)})

    for policy in policies:
        cluster.set_policy(policy)
        compare(policy, sequential(cluster.url, lambda: forget_caches(cluster)))
    cluster.set_policy("decode")
    compare("decode, its pool kept", sequential(cluster.url, lambda: forget_caches(cluster, "prefill")))
    cluster.set_policy(policies[-1])
    sessions = [Session(name) for name in SESSIONS]
    for turn in range(TURNS):
        forget_caches(cluster)
        play_all(cluster.url, sessions, turn)
    compare(f"{policies[-1]}, sessions at once", {session.name: session.answers for session in sessions})
    return all(equal)


def run_loads(
    record: Record, cluster: Cluster, policies: list[str], lengths: list[int], repetitions: int
) -> None:
    def put(name: str, times_s: list[float], **more) -> None:
        rounded = [round(time_s, 4) for time_s in times_s]
        record.put("loads", name, {"s": rounded, "median_s": statistics.median(rounded), **more})

    for tokens in lengths:
        fresh = [first_token_s(cluster.url, prompt_of(tokens, f"fresh {n}"))[0] for n in range(repetitions)]
        put(f"computed {tokens}", fresh)
        stored = prompt_of(tokens, "stored")
        first_token_s(cluster.url, stored)
        put(f"on the device {tokens}", [first_token_s(cluster.url, stored)[0] for _ in range(repetitions)])
        wait_until_persisted(cluster)
    for policy in policies:
        cluster.set_policy(policy)
        forget_caches(cluster)
        first_token_s(cluster.url, prompt_of(lengths[0], "stored"))  # the scheduler learns rates
        for tokens in lengths:
            times_s, cached = [], []
            before = counted(cluster)
            for _ in range(repetitions):
                forget_caches(cluster)
                spent_s, cached_tokens = first_token_s(cluster.url, prompt_of(tokens, "stored"))
                times_s.append(spent_s)
                cached.append(cached_tokens)
            after = counted(cluster)
            moved = {key: round(after[key] - before[key], 1) for key in before if key.endswith("_MB")}
            fallbacks = after["fallbacks"]
            put(f"{policy} {tokens}", times_s, cached_tokens=cached, reads=moved, fallbacks=fallbacks)


def table(loads: dict, lengths: list[int]) -> str:
    rows = list(dict.fromkeys(name.rsplit(" ", 1)[0] for name in loads))
    lines = [
        "| TTFT, median, s | " + " | ".join(f"{tokens} tokens" for tokens in lengths) + " |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    for row in rows:
        cells = [
            f"{loads[f'{row} {tokens}']['median_s']:.3f}" if f"{row} {tokens}" in loads else "-"
            for tokens in lengths
        ]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(
    config: Annotated[FilePath, typer.Option("--config", "-c", help="Cluster description, mode dualpath.")],
    out: Annotated[FilePath, typer.Option("--out", help="Directory of results, logs and spans.")],
    policies: Annotated[str, typer.Option(help="Path policies, comma-separated.")] = "prefill,decode,split",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="First prompt of a session.")] = 3000,
    lengths: Annotated[
        str, typer.Option(help="Prompt lengths of the load times, comma-separated; empty: none.")
    ] = "8192,16384,32768",
    repetitions: Annotated[int, typer.Option(min=1, help="Of each load time.")] = 3,
) -> None:
    """Compare tokens on every path with one server's, and time lone loads."""
    agents.FIRST_PROMPT_TOKENS = prompt_tokens
    description: ClusterConfig = load(config)
    names = policies.split(",")
    sizes = [int(length) for length in lengths.split(",") if length]
    record = Record(out)
    with single_server(description, out / "single") as server:
        record.say("the single server is up")
        reference = sequential(server.url)
        uncached = sequential(server.url, lambda: flush(server.url))
        record.put("tokens", "single server without cache", difference(uncached, reference))
    cluster = Cluster(description, out / "dualpath")
    cluster.start(record.say)
    with cluster:
        equal = run_tokens(record, cluster, names, reference)
        if sizes:
            run_loads(record, cluster, names, sizes, repetitions)
            text = table(record.content["loads"], sizes)
            (out / "table.md").write_text(text)
            print(text)
    if not equal:
        print("answers differ from the single server's", file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
