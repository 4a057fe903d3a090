"""One proof: sessions of some turns on a plain server, then on the cluster, which holds nothing before a turn.

Every engine's own caches are emptied before each turn, so what an engine knows of the turns before comes out
of the store.  A session's prompt holds the answers of the turns before it: one wrong token changes all of
the rest.
"""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Callable
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from dualpath_sgl.evals.agents.sessions import TURNS, Session, flush, forget_caches, play_all, reads
from dualpath_sgl.evals.models.cases import Case, described, single
from dualpath_sgl.evals.models.record import Record
from dualpath_sgl.launch.config.cluster import Mode
from dualpath_sgl.launch.supervision.cluster import Cluster
from dualpath_sgl.launch.supervision.single_server import SingleServer
from scheduler_svc.wire.protocol import Role

SESSIONS = ("ada", "bob", "eve")
Answers = dict[str, list[list[int]]]
ORDINARY = ("ready", "revoked")
"""Ends of a fetch that are nobody's fault: a batch is taken back from a relay that has not begun it."""


def prove(
    case: Case,
    device: str,
    mode: Mode,
    run_dir: Path,
    known: dict[str, Answers],
    say: Callable[[str], None],
    more_flags: tuple[str, ...] = (),
    more_env: dict[str, str] | None = None,
) -> Record:
    """`known`: answers of servers that have answered already; this one's are added.

    Raises what `Cluster` and `SingleServer` raise when an engine does not start.
    """
    config = described(case, device, mode, more_flags, more_env)
    alone = single(case, config)
    # In float32 a model's answers do not depend on the engine's flags.
    key = str(alone.model.directory()) + ("" if device == "cpu" else f" {alone.prefill}")
    if key not in known:
        with SingleServer(alone, run_dir / "single") as server:
            known[key] = answers_of_one(case, server.url)
        say(f"{case.name}: one server has answered; {_varied(known[key])} different tokens")
    with Cluster(config, run_dir / "cluster") as cluster:
        return compare(case, cluster, known[key], say)


def answers_of_one(case: Case, url: str) -> Answers:
    """One session after the other, every prompt computed from its first token.

    With a prefix cache an answer's KV would be what decoding left; a prefill engine computes it again, and on a
    GPU both kernels round differently.
    """
    sessions = sessions_of(case)
    for session in sessions:
        for turn in range(TURNS):
            flush(url)
            session.play(url, turn)
    return answers_of(sessions)


def compare(case: Case, cluster: Cluster, reference: Answers, say: Callable[[str], None]) -> Record:
    """Plays the sessions on the running cluster.  Raises RuntimeError when it took nothing from the store."""
    sessions = sessions_of(case)
    for turn in range(TURNS):
        forget_caches(cluster)
        play_all(cluster.url, sessions, turn)
    answers = answers_of(sessions)
    unequal = [
        f"{name}'s turn {turn}"
        for name in SESSIONS
        for turn in range(TURNS)
        if answers[name][turn] != reference[name][turn]
    ]
    config = cluster.config
    counted = reads(cluster) if config.mode is Mode.DECODE_SIDE else None
    record = Record(
        model=case.name,
        flags=case.told_flags,
        device=config.device,
        mode=config.mode.value,
        requests=len(SESSIONS) * TURNS,
        tokens_equal=not unequal,
        relay_bytes=round(relay_metric(cluster, "dualpath_relay_read_bytes_total")),
        forwarded_bytes=counted.forwarded_bytes if counted else 0,
        fallbacks=counted.fallbacks if counted else relay_faults(cluster),
    )
    loaded = loaded_tokens(cluster)
    if not loaded:
        raise RuntimeError(f"{case.name}: every prompt was computed, nothing was loaded")
    say(f"{record}; {loaded} tokens loaded" + (f"; unequal: {', '.join(unequal)}" if unequal else ""))
    return record


def sessions_of(case: Case) -> list[Session]:
    return [Session(name, case.prompt_tokens) for name in SESSIONS]


def answers_of(sessions: list[Session]) -> Answers:
    return {session.name: session.answers for session in sessions}


def loaded_tokens(cluster: Cluster) -> int:
    """That prefill engines did not compute, by their logs: as they held nothing, the store had them."""
    logs = [cluster.processes[e.name].log_path for e in cluster.engines if e.role is Role.PREFILL]
    return sum(int(found) for log in logs for found in re.findall(r"#cached-token: (\d+)", log.read_text()))


def relay_faults(cluster: Cluster) -> int:
    """Leases that ended before the pull, and fetches that were refused."""
    expired = relay_metric(cluster, "dualpath_relay_leases_total", lambda labels: labels["end"] == "expired")
    refused = relay_metric(
        cluster, "dualpath_relay_fetches_total", lambda labels: labels["outcome"] not in ORDINARY
    )
    return round(expired + refused)


def relay_metric(
    cluster: Cluster, name: str, wanted: Callable[[dict[str, str]], bool] = lambda labels: True
) -> float:
    """Sum over the relays and over labels."""
    total = 0.0
    for relay in cluster.relays:
        with urllib.request.urlopen(relay.metrics_url, timeout=10) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        samples = [sample for family in families for sample in family.samples]
        total += sum(sample.value for sample in samples if sample.name == name and wanted(sample.labels))
    return total


def _varied(answers: Answers) -> int:
    """Equal answers say little where a model repeats itself."""
    return len({token for turns in answers.values() for answer in turns for token in answer})
