"""The load benchmark: how fast stored KV reaches the prefill engine, per mode and path, on shaped links.

A storage-bound CPU model (`launch/clusters/bench-load.yaml`), every engine with a storage link and a compute
link of its own, a relay on the links of each decode engine in mode relay.  Prompts are put into the store once;
then, with the engines' caches emptied before each measurement, they are sent at once (`burst` and the like) or
one alone (`lone`).  The benchmark chooses the engines of each request, as a router would.  Answers are compared
throughout.

What is measured is on disk at once (`outcome/progress.py`): a run that ended early is begun again and measures
what is missing.  A cluster that breaks is started once more; the others are measured whatever happens to it.

Written to `out`: `summary.json` (outcome/summary.py), `jct.png`, and per cluster its logs.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.load import room
from dualpath_sgl.evals.load.client import OUTPUT_TOKENS
from dualpath_sgl.evals.load.cluster import LoadCluster, forward_rates
from dualpath_sgl.evals.load.outcome import plot, progress
from dualpath_sgl.evals.load.outcome.cells import Cell, Goodput
from dualpath_sgl.evals.load.outcome.figures import Found
from dualpath_sgl.evals.load.outcome.report import describe
from dualpath_sgl.evals.load.outcome.summary import LoadSummary, Setting, summarise
from dualpath_sgl.evals.load.plan import (
    REQUESTS,
    CellPlan,
    ClusterPlan,
    Fault,
    Links,
    Place,
    Plan,
    make_plan,
)
from dualpath_sgl.launch.config.cluster import ClusterConfig, Mode, bits_per_s, kv_bytes_per_token
from dualpath_sgl.launch.processes.process import ProcessDied
from dualpath_sgl.launch.supervision.cluster import Cluster
from dualpath_sgl.launch.supervision.readiness import require_ready
from dualpath_sgl.launch.supervision.supervisor import StartTimeout
from scheduler_svc.wire.protocol import Role

PROMPT_TOKENS = 264
"""16 whole pages, which are read, and a rest, which is computed: the last token always is."""
LONE_TOKENS = 536
"""33 pages: with less the ends of a load, which nobody can divide, would count for too much."""
TOKEN_VALUES = 250
SEED = 5
NEAR_BOUND = 0.85
COMPUTE_OVER_STORAGE = 8
"""Compute links are at least so much faster than storage links."""
FORWARDS = 40
"""Forwards out of the decode engine's memory, and as many reads of Mooncake alone beside them."""
LEARNING_REQUESTS = 4
"""Of each engine; they do not count: after them engines that measure their links know the new ones."""
ATTEMPTS = 2
"""Starts of a cluster that breaks."""
BREAKS = (EvalError, OSError, ProcessDied, StartTimeout)
"""What may befall one cluster and not the next."""


@dataclass(frozen=True)
class LoadOptions:
    cluster: ClusterConfig
    out: Path
    repetitions: int
    quick: bool
    """Only 1P1D, `basic`, `split` and `relay`, each once: for development."""


@dataclass(frozen=True)
class Outcome:
    summary: LoadSummary
    problems: tuple[str, ...]
    """Clusters that broke, and how: their cells are not complete."""


def run(options: LoadOptions, console: Console) -> Outcome:
    """Measure what is not measured yet and write the results.

    Raises EvalError or NotReady before anything starts, and what a cluster that cannot start raises.
    """
    links, plan = _checked(options), make_plan(options.repetitions, options.quick)
    bench = _Bench(options, links, plan, console)
    with bench.shown:
        bench.run()
    return Outcome(bench.summary(), tuple(bench.problems))


class _Links(NamedTuple):
    """Rates in bits per second."""

    storage: int
    compute: int | None


@dataclass
class _On:
    """A cluster while it is measured, and how its links and its scheduler stand."""

    plan: ClusterPlan
    load: LoadCluster
    links: Links | None = None
    """None: as a fault has left them."""
    policies: set[str] = field(default_factory=set)
    """The one that the scheduler has."""


class _Bench:
    def __init__(self, options: LoadOptions, links: _Links, plan: Plan, console: Console) -> None:
        self._options = options
        self._config = options.cluster
        self._links = links
        self._plan = plan
        self._begun_s = time.monotonic()
        self.problems: list[str] = []
        generator = random.Random(SEED)
        lengths = [PROMPT_TOKENS] * REQUESTS + [LONE_TOKENS]
        self._prompts = [[generator.randrange(TOKEN_VALUES) for _ in range(length)] for length in lengths]
        room.check(plan, self._at_a_time(), lambda text: console.print(text, soft_wrap=True))
        self._progress = progress.begin(options.out, self._settings())
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.shown = Progress(*columns, console=console)
        done = sum(
            min(self._progress.count(cell.name), cell.repetitions)
            for cluster in plan.all_clusters
            for cell in cluster.cells
        )
        if done:
            console.print(f"{options.out} holds {done} of {plan.measurements} measurements; going on")
        self._task = self.shown.add_task("measurements", total=plan.measurements, completed=done)

    def run(self) -> None:
        for cluster in self._plan.clusters:
            if self._is_wanted(cluster):
                self._attempt([cluster], self._measure_alone)
        if any(map(self._is_wanted, self._plan.pair)):
            self._attempt(list(self._plan.pair), self._measure_in_turns)
        self._progress.finished = not self.problems
        self._save()

    # -- clusters ----------------------------------------------------------------------------------

    def _attempt(self, plans: list[ClusterPlan], measure: Callable[[list[_On]], None]) -> None:
        """Start the clusters and measure on them; again, if one breaks."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with ExitStack() as stack:
                    on = [self._start(plan, stack) for plan in plans]
                    for one in on:
                        self._fill(one)
                    try:
                        measure(on)
                    except (EvalError, OSError):
                        for one in on:
                            one.load.cluster.check()  # A dead process explains more than the error it caused.
                        raise
            except BREAKS as error:
                told = f"{' and '.join(plan.name for plan in plans)}: {error}"
                self._say(f"attempt {attempt} of {ATTEMPTS} broke: {told}")
                if attempt == ATTEMPTS:
                    self.problems.append(told)
            else:
                return
            finally:
                self._save()

    def _start(self, plan: ClusterPlan, stack: ExitStack) -> _On:
        config = self._variant(plan)
        room.await_room(config)
        cluster = Cluster(config, self._options.out / plan.name)
        cluster.start(lambda text: self._say(f"{plan.name}: {text}") if "ready" in text else None)
        stack.enter_context(cluster)
        return _On(plan, LoadCluster(cluster, self._progress.expected), policies={config.scheduler.policy})

    def _fill(self, on: _On) -> None:
        """Put the prompts into the store, and let each engine read once: it connects and imports then."""
        engines = on.plan.topology
        places = [Place(n % engines.prefill, n % engines.decode) for n in range(len(self._prompts))]
        self._progress.cold_equal &= on.load.warm(self._prompts, places)
        self._progress.expected = on.load.expected
        on.load.flush()
        meetings = [Place(pe, de) for pe in range(engines.prefill) for de in range(engines.decode)]
        self._ask(on, list(range(len(meetings))), meetings)

    def _measure_alone(self, running: list[_On]) -> None:
        (on,) = running
        for series in on.plan.series:
            while waiting := [cell for cell in series if self._is_missing(cell)]:
                fewest = min(self._progress.count(cell.name) for cell in waiting)
                for cell in waiting:
                    if self._progress.count(cell.name) == fewest:
                        self._measure(on, cell)
        if on.plan.forwards and self._progress.goodput is None:
            self._progress.goodput = self._forward(on)

    def _measure_in_turns(self, running: list[_On]) -> None:
        """Burst by burst, since with no link to wait for a burst takes what the cores give it; from one minute to
        the next that differs more than the modes do."""
        cells = [(on, cell) for on in running for cell in on.plan.cells]
        while any(self._is_missing(cell) for _, cell in cells):
            for on, cell in cells:
                self._measure(on, cell)

    # -- one measurement ---------------------------------------------------------------------------

    def _measure(self, on: _On, cell: CellPlan) -> None:
        self.shown.update(self._task, description=cell.name)
        numbers, places = self._requests(cell)
        self._prepare(on, cell, numbers, places)
        after_s = 0.0
        if cell.fault is not None:
            after_s = self._fault_after_s(cell)
        sample = on.load.measure(
            [self._prompts[number] for number in numbers],
            places,
            numbers,
            {Fault.HALVED: on.load.halve, Fault.KILLED: on.load.kill_relay, None: None}[cell.fault],
            after_s,
        )
        if cell.fault is Fault.HALVED:
            on.links = None
        measured = self._progress.add(
            Cell(
                topology=cell.topology.name,
                mode=cell.mode,
                load=cell.load,
                requests=len(numbers),
                storage_bits_per_s=on.load.storage_bits_per_s,
                samples=[],
            ),
            sample,
        )
        self._progress.save(self._options.out)
        self.shown.advance(self._task)
        self._say(describe(measured, sample))

    def _prepare(self, on: _On, cell: CellPlan, numbers: list[int], places: list[Place]) -> None:
        """Relays, links, scheduler and caches as the cell wants them."""
        if on.plan.mode is Mode.DECODE_SIDE and cell.mode in POLICIES:
            self._set_policy(on, cell.mode)
        if on.plan.mode is Mode.RELAY:
            lone = len(self._prompts) - 1
            on.load.use_relays(cell.relays, self._prompts[lone], lone, places)
        if on.links is not cell.links:
            self._shape(on, cell.links)
        if set(cell.flushed) != EVERYBODY:
            # What is not emptied holds the prompts.
            self._ask(on, numbers, places)
        if cell.flushed:
            on.load.flush(*cell.flushed)

    def _set_policy(self, on: _On, policy: str) -> None:
        if policy not in on.policies:
            on.load.cluster.set_policy(policy)
            on.policies = {policy}

    def _shape(self, on: _On, links: Links) -> None:
        storage, compute = self._links
        if links is Links.NEAR_BOUND:
            storage = self._near_bound_rate()
            compute = None if compute is None else max(compute, COMPUTE_OVER_STORAGE * storage)
        unshaped = links is Links.UNSHAPED
        on.load.shape_storage(None if unshaped else storage)
        on.load.shape_compute(None if unshaped else compute)
        if on.plan.mode is Mode.DECODE_SIDE:
            engines = on.plan.topology
            count = LEARNING_REQUESTS * max(engines.prefill, engines.decode)
            places = [Place(n % engines.prefill, n % engines.decode) for n in range(count)]
            on.load.flush()
            self._ask(on, list(range(count)), places)
        on.links = links

    def _ask(self, on: _On, numbers: list[int], places: Sequence[Place]) -> None:
        """A measurement that does not count."""
        on.load.measure([self._prompts[number] for number in numbers], places, numbers)

    def _requests(self, cell: CellPlan) -> tuple[list[int], list[Place]]:
        """Numbers of the prompts, and who serves each."""
        places = cell.places
        if cell.is_lone:
            return [len(self._prompts) - 1], places
        # `alone` are those of `3to1` that the second prefill engine has.
        return (
            list(range(3, 4 * len(places), 4)) if cell.load == "alone" else list(range(len(places)))
        ), places

    def _forward(self, on: _On) -> Goodput:
        """Forward a whole prompt out of the decode engine's memory, unshaped.

        Mooncake alone moves as many bytes before each forward, so that both see the same machine.
        """
        load = on.load
        self._set_policy(on, "decode")
        self._shape(on, Links.UNSHAPED)
        size_bytes = PROMPT_TOKENS // load.cluster.config.page_size * self._page_bytes
        with load.raw_reads("prefill-0", "store", "storage", size_bytes) as rate:
            capacity = statistics.median(rate() for _ in range(FORWARDS))
        load.flush()
        self._ask(on, [0], [Place(0, 0)])
        raw: list[float] = []
        began_ns = time.time_ns()
        with load.raw_reads("prefill-0", "decode-0", "compute", size_bytes) as rate:
            for _ in range(FORWARDS):
                load.flush(Role.PREFILL)
                raw.append(rate())
                self._ask(on, [0], [Place(0, 0)])
        ended_ns = time.time_ns()
        load.cluster.stop()  # It writes its last spans then.
        rates = forward_rates(load.cluster, began_ns, ended_ns)
        if not rates:
            raise EvalError(
                f"no forward span in {load.cluster.spans_path}; is tracing.enabled in the cluster file?"
            )
        self._progress.store_capacity_bytes_per_s = capacity
        return Goodput(
            size_bytes=rates[0][0],
            forward_bytes_per_s=[rate for _, rate in rates],
            raw_bytes_per_s=raw,
        )

    def _near_bound_rate(self) -> int:
        """Storage rate at which `basic` would keep its link NEAR_BOUND busy.

        A burst takes loading plus the rest; the rest stays when the link gets faster.
        """
        if self._progress.near_bits_per_s is None:
            cell = self._progress.cells.get("1p1d/basic/burst")
            if cell is None:
                raise EvalError("near_bound needs the burst of basic, which could not be measured")
            load_s = cell.storage_bytes * 8 / self._links.storage
            rest_s = max(cell.job_s - load_s, 0.01 * cell.job_s)
            wanted_s = NEAR_BOUND / (1 - NEAR_BOUND) * rest_s
            self._progress.near_bits_per_s = round(cell.storage_bytes * 8 / wanted_s)
        return self._progress.near_bits_per_s

    def _fault_after_s(self, cell: CellPlan) -> float:
        """Half of what the burst needs at least."""
        pages = REQUESTS * (PROMPT_TOKENS // self._config.page_size)
        links = cell.topology.prefill + cell.topology.decode
        return pages * self._page_bytes * 8 / (links * self._links.storage) / 2

    # -- plan and results --------------------------------------------------------------------------

    def _is_missing(self, cell: CellPlan) -> bool:
        return self._progress.count(cell.name) < cell.repetitions

    def _is_wanted(self, plan: ClusterPlan) -> bool:
        forwards = plan.forwards and self._progress.goodput is None
        return forwards or any(self._is_missing(cell) for cell in plan.cells)

    def _variant(self, plan: ClusterPlan) -> ClusterConfig:
        config = self._config
        return config.model_copy(
            update={
                "mode": plan.mode,
                "prefill": config.prefill.model_copy(update={"count": plan.topology.prefill}),
                "decode": config.decode.model_copy(update={"count": plan.topology.decode}),
                # The same prompts are loaded again and again: what lies in a ring must not be given twice.
                "relays": config.relays.model_copy(
                    update={"env": {**config.relays.env, "DUALPATH_RELAY_KEEP_S": "0"}}
                ),
            }
        )

    def _at_a_time(self) -> list[list[ClusterConfig]]:
        """Clusters that run together."""
        return [[self._variant(plan)] for plan in self._plan.clusters] + (
            [[self._variant(plan) for plan in self._plan.pair]] if self._plan.pair else []
        )

    def _settings(self) -> dict:
        return {
            "cluster": self._config.model_dump(mode="json"),
            "repetitions": self._options.repetitions,
            "quick": self._options.quick,
            "prompt_tokens": PROMPT_TOKENS,
            "lone_tokens": LONE_TOKENS,
            "requests": REQUESTS,
        }

    def _save(self) -> None:
        self._progress.save(self._options.out)
        summary = self.summary()
        (self._options.out / "summary.json").write_text(summary.model_dump_json(indent=1) + "\n")
        plot.draw(summary, self._options.out / "jct.png")

    def _say(self, text: str) -> None:
        elapsed_s = time.monotonic() - self._begun_s
        self.shown.console.print(f"{elapsed_s:6.0f} s  {text}", soft_wrap=True, markup=False)

    def summary(self) -> LoadSummary:
        setting = Setting(
            storage_bits_per_s=self._links.storage,
            compute_bits_per_s=self._links.compute,
            kv_bytes_per_token=kv_bytes_per_token(self._config),
            prompt_tokens=PROMPT_TOKENS,
            lone_tokens=LONE_TOKENS,
            page_tokens=self._config.page_size,
            requests=REQUESTS,
            repetitions=self._options.repetitions,
        )
        found = self._progress
        return summarise(
            Found(found.cells, found.goodput, self._page_bytes),
            setting,
            tokens_equal=found.cold_equal,
            sources=found.sources,
            store_capacity_bytes_per_s=found.store_capacity_bytes_per_s,
        )

    @property
    def _page_bytes(self) -> int:
        return self._config.page_size * kv_bytes_per_token(self._config)


POLICIES = frozenset(("prefill", "decode", "shorter_queue", "split"))
"""Cells that are named after the scheduler's path policy; the others are measured under whatever it has."""
EVERYBODY = {Role.PREFILL, Role.DECODE}


def _checked(options: LoadOptions) -> _Links:
    """Raises EvalError, NotReady."""
    config = options.cluster
    if config.network is None or config.network.storage_rate is None:
        raise EvalError(
            "network.storage_rate is missing in the cluster file: the benchmark needs shaped links"
        )
    if options.repetitions < 1:
        raise EvalError(f"repetitions is {options.repetitions}; give at least 1")
    needed_tokens = REQUESTS * (PROMPT_TOKENS + OUTPUT_TOKENS)
    for role, group in (("prefill", config.prefill), ("decode", config.decode)):
        if group.max_total_tokens is not None and group.max_total_tokens < needed_tokens:
            raise EvalError(
                f"{role}.max_total_tokens is {group.max_total_tokens}; the burst needs {needed_tokens}"
            )
    require_ready(config)
    compute_rate = config.network.compute_rate
    return _Links(bits_per_s(config.network.storage_rate), bits_per_s(compute_rate) if compute_rate else None)
