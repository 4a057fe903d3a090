"""A small vocabulary for end-to-end stories: sessions that grow turn by turn, and what was read.

Every prompt is longer than a page, seeded, and continues with what the model really answered, so
equal answers imply equal prompts.
"""

from __future__ import annotations

import json
import random
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path as FilePath

from dualpath_sgl.launch.supervision.cluster import Cluster
from scheduler_svc.wire.protocol import Path, Status, Workload

FIRST_PROMPT_TOKENS = 700
APPEND_TOKENS = 75
ANSWER_TOKENS = 12
TURNS = 3
REQUEST_TIMEOUT_S = 120.0
SETTLE_TIMEOUT_S = 30.0
SERVED_TIMEOUT_S = 120.0
IDLE_TIMEOUT_S = 60.0
"""Longer than a lease: whatever a request held is let go by then."""


def generate(url: str, prompt: list[int], traceparent: str | None = None) -> list[int]:
    """Greedy answer to `prompt`; raises OSError (HTTPError for an HTTP error status)."""
    body = {
        "input_ids": prompt,
        "sampling_params": {"temperature": 0, "max_new_tokens": ANSWER_TOKENS, "ignore_eos": True},
    }
    headers = {"Content-Type": "application/json"}
    if traceparent is not None:
        headers["traceparent"] = traceparent
    request = urllib.request.Request(f"{url}/generate", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as answer:
        return json.load(answer)["output_ids"]


@dataclass
class Session:
    """One agent: `answers` grows by one per turn."""

    name: str
    first_prompt_tokens: int = FIRST_PROMPT_TOKENS
    answers: list[list[int]] = field(default_factory=list)

    def prompt(self, turn: int) -> list[int]:
        rng = random.Random(f"e2e/{self.name}")
        tokens = [rng.randrange(250) for _ in range(self.first_prompt_tokens)]
        for answer in self.answers[:turn]:
            tokens += answer + [rng.randrange(250) for _ in range(APPEND_TOKENS)]
        return tokens

    def play(self, url: str, turn: int) -> list[int]:
        """Ask turn `turn`, whose prompt holds the answers of the turns before it."""
        answer = generate(url, self.prompt(turn))
        self.answers[turn:] = [answer]
        return answer


def play_all(url: str, sessions: list[Session], turn: int) -> None:
    """All sessions ask their turn at once."""
    with ThreadPoolExecutor(len(sessions)) as pool:
        list(pool.map(lambda session: session.play(url, turn), sessions))


@dataclass(frozen=True)
class Reads:
    """What the scheduler counted, by role."""

    prefill_store_bytes: int
    decode_store_bytes: int
    forwarded_bytes: int
    paths: dict[Path, int]
    fallbacks: int
    duplicate_store_pages: int


def reads(cluster: Cluster) -> Reads:
    """Totals since the scheduler started, once every room is closed."""
    return reads_of(settled_status(cluster))


def reads_of(status: Status) -> Reads:
    store = {"prefill": 0, "decode": 0}
    for engine in status.engines:
        store[engine.engine.role.value] += engine.store_read_bytes
    return Reads(
        store["prefill"],
        store["decode"],
        sum(engine.forwarded_bytes for engine in status.engines),
        {path: count for path, count in status.paths.items() if count},
        sum(status.fallbacks.values()),
        status.duplicate_store_pages,
    )


def wait_until_served(cluster: Cluster) -> None:
    """Until every engine has answered: the router notices a returned one by itself, after a while."""
    before = {engine.name: answered(cluster, engine.name) for engine in cluster.engines}
    deadline_s = time.monotonic() + SERVED_TIMEOUT_S
    problem = "the router sends it nothing"
    while idle := [name for name, count in before.items() if answered(cluster, name) == count]:
        assert time.monotonic() < deadline_s, f"{idle} answered no request after the restart: {problem}"
        try:
            generate(cluster.url, [1, 2, 3, 4])
        except OSError as error:
            problem = str(error)
        time.sleep(0.5)


def answered(cluster: Cluster, engine: str) -> int:
    """Requests that an engine has answered, by its log."""
    return cluster.processes[engine].log_path.read_text().count('"POST /generate HTTP/1.1" 200')


def settled_status(cluster: Cluster) -> Status:
    deadline_s = time.monotonic() + SETTLE_TIMEOUT_S
    with cluster.ask_scheduler() as client:
        while (status := client.status(2.0)).rooms_open:
            assert time.monotonic() < deadline_s, f"{status.rooms_open} rooms stay open"
            time.sleep(0.1)
    return status


def wait_until_persisted(cluster: Cluster) -> None:
    """Until the store's content has been the same for a second: write-through is asynchronous."""
    deadline_s = time.monotonic() + SETTLE_TIMEOUT_S
    keys, since_s = -1, time.monotonic()
    while time.monotonic() - since_s < 1.0:
        assert time.monotonic() < deadline_s, "the store keeps growing"
        now = stored_keys(cluster)
        if now != keys:
            keys, since_s = now, time.monotonic()
        time.sleep(0.1)


def stored_keys(cluster: Cluster) -> int:
    with urllib.request.urlopen(cluster.master_metrics_url, timeout=5) as page:
        for line in page.read().decode().splitlines():
            if line.startswith("master_key_count "):
                return int(float(line.split()[1]))
    raise AssertionError("mooncake_master exports no master_key_count")


def assert_nothing_is_held(cluster: Cluster) -> None:
    """Once idle, no engine holds a request's pages, and its pools can be emptied to the last page."""
    checked = {name: engine.pool_checks for name, engine in loads(cluster).items()}
    forget_caches(cluster)
    deadline_s = time.monotonic() + IDLE_TIMEOUT_S
    while True:
        now = loads(cluster)
        held = {name: load.held for name, load in now.items() if load.held or load.read_queue_bytes}
        unchecked = [name for name, load in now.items() if load.pool_checks <= checked[name]]
        if not held and not unchecked:
            break
        assert time.monotonic() < deadline_s, f"idle, but held: {held}; pools not checked: {unchecked}"
        if unchecked:
            # SGLang was still copying to the host pool or the store when it was asked.
            forget_caches(cluster)
        time.sleep(0.5)
    kept = {name: load.kept_pages for name, load in now.items() if load.kept_pages}
    assert not kept, f"pages that nobody can give back: {kept}; the engines' logs say when"


def loads(cluster: Cluster) -> dict[str, Workload]:
    """What every live engine says of itself, by engine."""
    with cluster.ask_scheduler() as client:
        return {engine.engine.engine_id: engine.load for engine in client.status(2.0).engines}


def forget_caches(cluster: Cluster, *roles: str) -> None:
    """Empty L1 and L2 of the engines with these roles (all without one); the store keeps its pages."""
    wait_until_persisted(cluster)
    for engine in cluster.engines:
        if not roles or engine.role.value in roles:
            flush(engine.url)


def update_weights(url: str, directory: FilePath, version: str | None = None) -> None:
    """Give a server the weights of another model of the same dimensions; raises OSError when it refuses."""
    post(f"{url}/update_weights_from_disk", {"model_path": str(directory), "weight_version": version})


def post(url: str, body: dict) -> None:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S).close()


def flush(url: str) -> None:
    """SGLang refuses while it is not idle: ask again."""
    deadline_s = time.monotonic() + SETTLE_TIMEOUT_S
    while True:
        try:
            urllib.request.urlopen(
                urllib.request.Request(f"{url}/flush_cache", b"", method="POST"), timeout=30
            )
            return
        except OSError:
            assert time.monotonic() < deadline_s, f"{url} does not become idle"
            time.sleep(0.2)
