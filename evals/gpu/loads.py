"""Load times of prompts that the store holds, on one running cluster: alone, and in a burst.

A measurement is a *cell*: `mode load tokens`, with one sample per repetition.  Modes are `basic`
(upstream) or path policies of one DualPath cluster.  Loads are

    held      every engine has the prompt on its device: what an answer costs besides loading
    sent      the decode engine's caches were emptied: as `held`, and the prefill engine's KV is sent
    resident  the prefill engine's caches were emptied, after every decode engine has had the prompt: the
              pages are forwarded, not read
    lone      all caches were emptied: the store is read
    burst     the same, with several prompts at once
    burst held    the burst's prompts, nothing emptied

With several decode engines the router gives them prompts in turns.  `evals/gpu/smoke.py` starts the
clusters, `evals/gpu/report.py` makes tables of the cells, `evals/gpu/goodput.py` puts forwards
beside Mooncake alone.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from dualpath_sgl.evals.compare import measure
from dualpath_sgl.evals.load.client import send
from dualpath_sgl.launch.supervision.cluster import Cluster
from scheduler_svc.wire.protocol import Role

DUALPATH = "dualpath"
"""Of what is measured beside upstream's: the cluster file's own mode."""
TOKEN_VALUES = 250
LONE_POLICIES = ("prefill", "decode", "split")
RESIDENT_POLICY = "decode"
BURST_POLICIES = ("prefill", "decode", "shorter_queue", "split")
HELD_REPETITIONS = 3
"""Repetitions of what reads nothing: short, and the first ones connect."""
RESIDENT_REPETITIONS = 7

Prompt = list[int]


@dataclass(frozen=True)
class LoadPlan:
    """What is measured; lengths in tokens."""

    lengths: tuple[int, ...]
    """Lengths of lone loads; of each one prompt is loaded alone, under every lone policy."""
    repetitions: int
    burst_requests: int
    burst_tokens: int
    burst_repetitions: int
    burst_policies: tuple[str, ...] = BURST_POLICIES
    held: bool = True
    """Also what prompts take that nobody has to load."""
    resident_lengths: tuple[int, ...] = ()
    decode_engines: int = 1

    @property
    def anything(self) -> bool:
        return bool(self.lengths or self.burst_requests or self.resident_lengths)

    @property
    def prompts(self) -> list[Prompt]:
        """Everything that the store has to hold."""
        alone = sorted({*self.lengths, *self.resident_lengths})
        return [*(prompt for tokens in alone for prompt in self.lone(tokens)), *self.burst()]

    def lone(self, tokens: int) -> list[Prompt]:
        return [_prompt(tokens, "lone")]

    def burst(self) -> list[Prompt]:
        return [_prompt(self.burst_tokens, f"burst {number}") for number in range(self.burst_requests)]


@dataclass
class Cell:
    mode: str
    load: str
    tokens: int
    """Length of each prompt."""
    job_s: list[float] = field(default_factory=list)
    """Sending the first prompt to the end of the last answer, per sample."""
    ttft_s: list[list[float]] = field(default_factory=list)
    """Per sample, in the order of its prompts."""
    cached_tokens: list[int] = field(default_factory=list)
    """Not computed, of all prompts of a sample."""
    window_ns: list[tuple[int, int]] = field(default_factory=list)
    """Begin and end since 1970, where its spans are found."""
    store_bytes: dict[str, int] = field(default_factory=dict)
    """Read from the store by each engine, all samples."""
    forwarded_bytes: int = 0
    fallbacks: int = 0
    duplicate_store_pages: int = 0
    equal_answers: bool = True
    """To the first answers the whole run got for the same prompts."""
    stages_s: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Stage -> medians of its begin after the request's, and of its length."""

    @property
    def name(self) -> str:
        return cell_name(self.mode, self.load, self.tokens)

    @property
    def median_ttft_s(self) -> float:
        """Median over the samples' first prompts."""
        return median(times[0] for times in self.ttft_s)

    @property
    def median_job_s(self) -> float:
        return median(self.job_s)


def cell_name(mode: str, load: str, tokens: int) -> str:
    return f"{mode} {load} {tokens}"


OnCell = Callable[[Cell], None]
Expected = dict[tuple[int, ...], tuple[int, ...]]
"""Prompt -> answer."""


class LoadMeter:
    """Measures on one cluster. `expected` is shared between clusters and filled by the first."""

    def __init__(self, cluster: Cluster, plan: LoadPlan, expected: Expected, on_cell: OnCell):
        self._cluster = cluster
        self._plan = plan
        self._expected = expected
        self._on_cell = on_cell

    def fill(self, until_persisted: Callable[[], None]) -> None:
        """Have every prompt computed once and wait until the store holds its pages."""
        for prompt in self._plan.prompts:
            send(self._cluster.url, [prompt])
        until_persisted()

    def upstream(self) -> None:
        """Mode basic: held, lone and burst."""
        mode = self._cluster.config.mode.value
        self._held(mode)
        self._connect()
        self._from_store(mode)
        self._burst(mode)

    def dualpath(self) -> None:
        """Every policy; what reads nothing under the first one."""
        self._cluster.set_policy("prefill")
        self._held(DUALPATH)
        self._sent()
        for policy in self._policies:
            self._cluster.set_policy(policy)
            self._connect()
            if policy in LONE_POLICIES:
                self._from_store(policy)
            if policy in self._plan.burst_policies:
                self._burst(policy)
            if policy == RESIDENT_POLICY:
                self._resident(policy)

    @property
    def _policies(self) -> list[str]:
        wanted = {
            *(LONE_POLICIES if self._plan.lengths else ()),
            *(self._plan.burst_policies if self._plan.burst_requests else ()),
            *((RESIDENT_POLICY,) if self._plan.resident_lengths else ()),
        }
        return [policy for policy in dict.fromkeys((*LONE_POLICIES, *BURST_POLICIES)) if policy in wanted]

    # -- cells -------------------------------------------------------------------------------------

    def _held(self, mode: str) -> None:
        if not self._plan.held:
            return
        for tokens in self._plan.lengths:
            prompts = self._plan.lone(tokens)
            send(self._cluster.url, prompts)
            self._cell(mode, "held", tokens, prompts, HELD_REPETITIONS)
        if self._plan.burst_requests:
            send(self._cluster.url, self._plan.burst())
            self._cell(mode, "burst held", self._plan.burst_tokens, self._plan.burst(), HELD_REPETITIONS)

    def _sent(self) -> None:
        if not self._plan.held:
            return
        for tokens in self._plan.lengths:
            prompts = self._plan.lone(tokens)
            self._cell(DUALPATH, "sent", tokens, prompts, HELD_REPETITIONS, Role.DECODE)

    def _connect(self) -> None:
        """The first read of each engine connects, and tells the scheduler its rate; it does not count."""
        for _ in range(self._plan.decode_engines):
            self._cluster.flush_caches()
            send(self._cluster.url, self._plan.prompts[:1])

    def _from_store(self, mode: str) -> None:
        for tokens in self._plan.lengths:
            self._cell(mode, "lone", tokens, self._plan.lone(tokens), self._plan.repetitions, *Role)

    def _resident(self, mode: str) -> None:
        for tokens in self._plan.resident_lengths:
            prompts = self._plan.lone(tokens)
            for _ in range(self._plan.decode_engines):
                send(self._cluster.url, prompts)
            self._cell(mode, "resident", tokens, prompts, RESIDENT_REPETITIONS, Role.PREFILL)

    def _burst(self, mode: str) -> None:
        if self._plan.burst_requests:
            prompts = self._plan.burst()
            self._cell(mode, "burst", self._plan.burst_tokens, prompts, self._plan.burst_repetitions, *Role)

    def _cell(
        self, mode: str, load: str, tokens: int, prompts: Sequence[Prompt], repetitions: int, *emptied: Role
    ) -> None:
        cell = Cell(mode, load, tokens)
        before = measure.of(self._cluster)
        for _ in range(repetitions):
            measure.of(self._cluster)  # waits until the sample before is reported
            for role in emptied:
                self._cluster.flush_caches(role)
            begun_ns = time.time_ns()
            burst = send(self._cluster.url, prompts)
            cell.window_ns.append((begun_ns, time.time_ns()))
            cell.job_s.append(burst.job_s)
            cell.ttft_s.append([answer.ttft_s for answer in burst.answers])
            cell.cached_tokens.append(sum(answer.cached_tokens for answer in burst.answers))
            for prompt, answer in zip(prompts, burst.answers, strict=True):
                expected = self._expected.setdefault(tuple(prompt), answer.tokens)
                cell.equal_answers &= answer.tokens == expected
        did = measure.of(self._cluster).since(before)
        for engine, read in did.engines.items():
            cell.store_bytes[engine] = read.store_read_bytes
            cell.forwarded_bytes += read.forwarded_bytes
        cell.fallbacks = sum(did.fallbacks.values())
        cell.duplicate_store_pages = did.duplicate_store_pages or 0
        self._on_cell(cell)


def _prompt(tokens: int, seed: str) -> Prompt:
    rng = random.Random(f"load/{tokens}/{seed}")
    return [rng.randrange(TOKEN_VALUES) for _ in range(tokens)]
