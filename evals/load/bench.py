"""The load benchmark: how fast stored KV reaches the prefill engine, per path, on shaped links.

A storage-bound CPU model (`launch/clusters/bench-load.yaml`), every engine with a storage link and
a compute link of its own.  Prompts are put into the store once; then, with the engines' caches
emptied before each measurement, all of them are sent at once (`burst`) or one alone (`lone`).
Path policies are compared side by side on one cluster (only the scheduler restarts); `basic` and
`both` are upstream and need clusters of their own.  Answers are compared throughout.

Written to `out`: `summary.json` (evals/load/summary.py), `jct.png`, and per cluster its logs.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.load import plot
from dualpath_sgl.evals.load.client import OUTPUT_TOKENS
from dualpath_sgl.evals.load.cluster import LoadCluster, forward_rates
from dualpath_sgl.evals.load.summary import (
    TARGETS,
    Cell,
    Details,
    Found,
    Goodput,
    LoadSummary,
    Sample,
    figure_values,
    figures,
)
from dualpath_sgl.launch.config.cluster import ClusterConfig, Mode, bits_per_s, kv_bytes_per_token
from dualpath_sgl.launch.supervision.cluster import Cluster
from dualpath_sgl.launch.supervision.readiness import require_ready
from scheduler_svc.wire.protocol import Role

REQUESTS = 10
PROMPT_TOKENS = 264
"""16 whole pages, which are read, and a rest, which is computed: the last token always is."""
TOKEN_VALUES = 250
SEED = 5
STORAGE_BOUND = 0.95
NEAR_BOUND = 0.85
COMPUTE_OVER_STORAGE = 8
"""Compute links are at least so much faster than storage links."""
RESIDENT_POLICIES = ("decode", "split")
BURST_POLICIES = ("decode", "shorter_queue", "split")
LONE_POLICIES = ("prefill", "decode", "split")
FORWARDS = 40
"""Forwards out of the decode engine's memory, and as many reads of Mooncake alone beside them."""
UNSHAPED_SAMPLES = 10
"""Per repetition: they are short, and without a link to wait for they vary most."""


@dataclass(frozen=True)
class LoadOptions:
    cluster: ClusterConfig
    out: Path
    repetitions: int
    quick: bool
    """Only 1P1D, `basic` and `split`, each once: for development."""


def run(options: LoadOptions, console: Console) -> LoadSummary:
    """Measure everything and write the results.  Raises EvalError, NotReady and start-up errors."""
    bench = _Bench(options, _checked(options), console)
    with bench.progress:
        near_bits_per_s = bench.upstream_1p1d()
        bench.dualpath_1p1d(near_bits_per_s)
        if not options.quick:
            bench.split_1p2d()
            bench.basic("1p2d", prefill=1, decode=2)
            bench.basic("2p1d", prefill=2, decode=1)
            bench.both_1p1d()
            bench.unshaped_1p1d()
    summary = bench.summary()
    print_summary(summary, console)
    return summary


class _Links(NamedTuple):
    """Rates in bits per second."""

    storage: int
    compute: int | None


class _Forwards(NamedTuple):
    began_ns: int
    ended_ns: int
    raw_bytes_per_s: list[float]
    """Mooncake alone, between them."""


Measured = TypeVar("Measured")


class _Bench:
    def __init__(self, options: LoadOptions, links: _Links, console: Console) -> None:
        self._options = options
        self._config = options.cluster
        self._links = links
        self._begun_s = time.monotonic()
        generator = random.Random(SEED)
        self._prompts = [
            [generator.randrange(TOKEN_VALUES) for _ in range(PROMPT_TOKENS)] for _ in range(REQUESTS)
        ]
        self._expected: list[tuple[int, ...]] | None = None
        self._cold_equal = True
        self._cells: dict[str, Cell] = {}
        self._goodput: Goodput | None = None
        self._store_capacity: float | None = None
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=console)
        self._task = self.progress.add_task("clusters", total=2 if options.quick else 8)

    # -- one cluster each --------------------------------------------------------------------------

    def upstream_1p1d(self) -> int:
        """Returns the rate of the `near_bound` cells' storage links, in bits per second."""

        def measure(on: LoadCluster) -> int:
            for _ in range(self._options.repetitions):
                self._burst(on, "1p1d", "basic")
            for _ in range(self._lone_repetitions):
                on.flush()
                self._sample(on, "1p1d", "basic", "lone", 1)
            near_bits_per_s = self._near_bound_rate()
            self._oracle(on, "oracle_upstream")
            self._near_bound(on, "basic", near_bits_per_s)
            return near_bits_per_s

        return self._on_cluster("1p1d-basic", self._variant(Mode.BASIC, 1, 1), measure)[1]

    def dualpath_1p1d(self, near_bits_per_s: int) -> None:
        def measure(on: LoadCluster) -> _Forwards:
            self._paths(on)
            on.cluster.set_policy("split")
            self._near_bound(on, "split", near_bits_per_s)
            return self._forward(on)

        cluster, forwards = self._on_cluster("1p1d-dualpath", self._variant(Mode.DUALPATH, 1, 1), measure)
        rates = forward_rates(cluster, forwards.began_ns, forwards.ended_ns)
        if not rates:
            raise EvalError(
                f"no forward span in {cluster.spans_path}; is tracing.enabled in the cluster file?"
            )
        self._goodput = Goodput(
            size_bytes=rates[0][0],
            forward_bytes_per_s=[rate for _, rate in rates],
            raw_bytes_per_s=forwards.raw_bytes_per_s,
        )

    def both_1p1d(self) -> None:
        def measure(on: LoadCluster) -> None:
            for _ in range(self._options.repetitions):
                self._burst(on, "1p1d", "both")

        self._on_cluster("1p1d-both", self._variant(Mode.BOTH, 1, 1), measure)

    def basic(self, topology: str, prefill: int, decode: int) -> None:
        def measure(on: LoadCluster) -> None:
            for _ in range(self._options.repetitions):
                self._burst(on, topology, "basic")

        self._on_cluster(f"{topology}-basic", self._variant(Mode.BASIC, prefill, decode), measure)

    def split_1p2d(self) -> None:
        def measure(on: LoadCluster) -> None:
            on.cluster.set_policy("split")
            for _ in range(self._options.repetitions):
                self._burst(on, "1p2d", "split")

        self._on_cluster("1p2d-dualpath", self._variant(Mode.DUALPATH, 1, 2), measure)

    def unshaped_1p1d(self) -> None:
        """`basic` and `split` burst by burst in turns, on two clusters at once, without shaping.

        With no link to wait for, a burst takes what the cores give it; from one minute to the next that
        differs more than the two modes do.
        """
        basic, split = self._variant(Mode.BASIC, 1, 1), self._variant(Mode.DUALPATH, 1, 1)

        def measure(upstream: LoadCluster, dualpath: LoadCluster) -> None:
            dualpath.cluster.set_policy("split")
            in_turns = {"basic": upstream, "split": dualpath}
            for on in in_turns.values():
                self._unshape(on)
            for _ in range(UNSHAPED_SAMPLES * self._options.repetitions):
                for mode, on in in_turns.items():
                    on.flush()
                    self._sample(on, "1p1d", mode, "unshaped", REQUESTS)

        self._on_cluster(
            "1p1d-basic-unshaped",
            basic,
            lambda upstream: self._on_cluster(
                "1p1d-split-unshaped", split, lambda dualpath: measure(upstream, dualpath)
            ),
        )

    # -- parts of them -----------------------------------------------------------------------------

    def _paths(self, on: LoadCluster) -> None:
        policies = ("split",) if self._options.quick else BURST_POLICIES
        for _ in range(self._options.repetitions):
            for policy in policies:
                on.cluster.set_policy(policy)
                self._burst(on, "1p1d", policy)
        self._oracle(on, "oracle")
        for _ in range(self._lone_repetitions):
            for policy in LONE_POLICIES:
                on.cluster.set_policy(policy)
                on.flush()
                self._sample(on, "1p1d", policy, "lone", 1)
        for policy in RESIDENT_POLICIES:
            on.cluster.set_policy(policy)
            on.flush(Role.PREFILL)
            self._sample(on, "1p1d", policy, "resident", 1)

    def _oracle(self, on: LoadCluster, mode: str) -> None:
        """Nothing is emptied before: whatever the answers cost besides loading."""
        on.measure(self._prompts)
        for _ in range(self._lone_repetitions):
            self._sample(on, "1p1d", mode, "lone", 1)
        for _ in range(self._options.repetitions):
            self._sample(on, "1p1d", mode, "burst", REQUESTS)

    def _near_bound(self, on: LoadCluster, mode: str, storage_bits_per_s: int) -> None:
        compute_bits_per_s = on.network.plan.link("prefill-0", "compute").bits_per_s
        on.shape_storage(storage_bits_per_s)
        if compute_bits_per_s is not None:
            on.shape_compute(max(compute_bits_per_s, COMPUTE_OVER_STORAGE * storage_bits_per_s))
        self._learn_rates(on)
        for _ in range(self._options.repetitions):
            on.flush()
            self._sample(on, "1p1d", mode, "near_bound", REQUESTS)

    def _unshape(self, on: LoadCluster) -> None:
        on.shape_storage(None)
        on.shape_compute(None)
        self._learn_rates(on)

    def _forward(self, on: LoadCluster) -> _Forwards:
        """Forward a whole prompt out of the decode engine's memory, unshaped.

        Mooncake alone moves as many bytes before each forward, so that both see the same machine.
        """
        on.cluster.set_policy("decode")
        self._unshape(on)
        size_bytes = PROMPT_TOKENS // on.cluster.config.page_size * self._page_bytes
        with on.raw_reads("prefill-0", "store", "storage", size_bytes) as rate:
            self._store_capacity = statistics.median(rate() for _ in range(FORWARDS))
        on.flush()
        on.measure(self._prompts[:1])
        raw: list[float] = []
        began_ns = time.time_ns()
        with on.raw_reads("prefill-0", "decode-0", "compute", size_bytes) as rate:
            for _ in range(FORWARDS):
                on.flush(Role.PREFILL)
                raw.append(rate())
                on.measure(self._prompts[:1])
        return _Forwards(began_ns, time.time_ns(), raw)

    def _learn_rates(self, on: LoadCluster) -> None:
        """Links have changed: one burst that does not count, for engines that measure them."""
        on.flush()
        on.measure(self._prompts)

    def _burst(self, on: LoadCluster, topology: str, mode: str) -> None:
        on.flush()
        self._sample(on, topology, mode, "burst", REQUESTS)

    def _sample(self, on: LoadCluster, topology: str, mode: str, load: str, requests: int) -> None:
        """One measurement of a cell; whose caches are empty is the caller's matter."""
        sample = on.measure(self._prompts[:requests])
        cell = Cell(
            topology=topology,
            mode=mode,
            load=load,
            requests=requests,
            storage_bits_per_s=on.storage_bits_per_s,
            samples=[],
        )
        cell = self._cells.setdefault(cell.name, cell)
        cell.samples.append(sample)
        self._say(_describe(cell, sample))

    def _near_bound_rate(self) -> int:
        """Storage rate at which `basic` would keep its link NEAR_BOUND busy.

        A burst takes loading plus the rest; the rest stays when the link gets faster.
        """
        cell = self._cells["1p1d/basic/burst"]
        load_s = cell.storage_bytes * 8 / self._links.storage
        rest_s = max(cell.job_s - load_s, 0.01 * cell.job_s)
        wanted_s = NEAR_BOUND / (1 - NEAR_BOUND) * rest_s
        return round(cell.storage_bytes * 8 / wanted_s)

    @property
    def _lone_repetitions(self) -> int:
        return 1 if self._options.quick else self._options.repetitions + 2

    # -- clusters and results ----------------------------------------------------------------------

    def _variant(self, mode: Mode, prefill: int, decode: int) -> ClusterConfig:
        config = self._config
        return config.model_copy(
            update={
                "mode": mode,
                "prefill": config.prefill.model_copy(update={"count": prefill}),
                "decode": config.decode.model_copy(update={"count": decode}),
            }
        )

    def _on_cluster(
        self, name: str, config: ClusterConfig, measure: Callable[[LoadCluster], Measured]
    ) -> tuple[Cluster, Measured]:
        self.progress.update(self._task, description=name)
        cluster = Cluster(config, self._options.out / name)
        cluster.start(lambda text: self._say(f"{name}: {text}") if "ready" in text else None)
        with cluster:
            on = LoadCluster(cluster, self._expected)
            storage_bits_per_s = on.storage_bits_per_s
            self._cold_equal &= on.warm(self._prompts)
            self._expected = on.expected
            on.shape_storage(storage_bits_per_s)
            # The first read of each engine connects and imports; it does not count.
            on.flush()
            on.measure(self._prompts[:1])
            try:
                measured = measure(on)
            except (EvalError, OSError):
                cluster.check()  # A dead engine explains more than the error it caused.
                raise
        self.progress.advance(self._task)
        self._save()
        return cluster, measured

    def _save(self) -> None:
        """What is known so far: an interrupted run has measured what it has measured."""
        summary = self.summary()
        (self._options.out / "summary.json").write_text(summary.model_dump_json(indent=1) + "\n")
        plot.draw(summary, self._options.out / "jct.png")

    def _say(self, text: str) -> None:
        elapsed_s = time.monotonic() - self._begun_s
        self.progress.console.print(f"{elapsed_s:6.0f} s  {text}", soft_wrap=True, markup=False)

    def summary(self) -> LoadSummary:
        found = Found(self._cells, self._goodput, self._page_bytes)
        values = figure_values(found)
        samples = [sample for cell in self._cells.values() for sample in cell.samples]
        basic, near = self._cells["1p1d/basic/burst"], self._cells["1p1d/basic/near_bound"]
        near_split = self._cells.get("1p1d/split/near_bound")
        return LoadSummary(
            **values,
            tokens_equal=self._cold_equal and all(sample.tokens_equal for sample in samples),
            details=Details(
                figures=figures(values),
                cells=self._cells,
                goodput=self._goodput,
                storage_bits_per_s=self._links.storage,
                compute_bits_per_s=self._links.compute,
                kv_bytes_per_token=kv_bytes_per_token(self._config),
                prompt_tokens=PROMPT_TOKENS,
                requests=REQUESTS,
                basic_utilisation=basic.busiest_link,
                near_bound_utilisation=near.busiest_link,
                near_bound_jct_ratio=near.job_s / near_split.job_s if near_split else None,
                store_peak_bytes_per_s=max(
                    s.store_sent_bytes / s.job_s for s in samples if s.storage_utilisation is not None
                ),
                store_capacity_bytes_per_s=self._store_capacity,
            ),
        )

    @property
    def _page_bytes(self) -> int:
        return self._config.page_size * kv_bytes_per_token(self._config)


def print_summary(summary: LoadSummary, console: Console) -> None:
    table = Table("figure", "measured", "target", "limit", "paper", "", title="Load paths")
    for name in TARGETS:
        figure = summary.details.figures[name]
        sign = "≥" if figure.at_least else "≤"
        verdict = "not measured" if figure.met is None else "met" if figure.met else "[red]missed[/]"
        table.add_row(
            figure.what,
            "-" if figure.value is None else f"{figure.value:.4g}",
            f"{sign} {figure.target:g}",
            "-" if figure.limit is None else f"{figure.limit:g}",
            figure.paper,
            verdict,
        )
    table.add_row(
        "tokens equal in every cell", "yes" if summary.tokens_equal else "[red]NO[/]", "yes", "", "", ""
    )
    console.print(table)
    cells = Table("cell", "JCT", "TTFT", "store bytes", "busiest storage link", title="Cells (medians)")
    for name, cell in summary.details.cells.items():
        cells.add_row(
            name,
            f"{cell.job_s:.2f} s",
            f"{cell.ttft_s:.2f} s",
            f"{cell.storage_bytes / 1e6:.1f} MB",
            "-" if cell.busiest_link is None else f"{cell.busiest_link:.1%}",
        )
    console.print(cells)
    details = summary.details
    if details.basic_utilisation is not None:
        is_bound = details.basic_utilisation >= STORAGE_BOUND
        bound = "storage-bound" if is_bound else "[red]not storage-bound[/]"
        console.print(f"basic keeps its storage link {details.basic_utilisation:.1%} busy ({bound})")
    if details.near_bound_jct_ratio is not None:
        console.print(
            f"with faster links, {details.near_bound_utilisation:.1%} busy, JCT basic/split is "
            f"{details.near_bound_jct_ratio:.2f} ({details.near_bound_jct_ratio / 2:.0%} of the limit)"
        )
    if details.store_capacity_bytes_per_s is not None:
        console.print(
            f"store node: at most {details.store_peak_bytes_per_s / 1e6:.0f} MB/s sent in a shaped "
            f"measurement, {details.store_capacity_bytes_per_s / 1e6:.0f} MB/s possible"
        )
    if details.goodput is not None:
        console.print(
            f"forwarding {details.goodput.size_bytes / 1e6:.1f} MB, unshaped: "
            f"{statistics.median(details.goodput.forward_bytes_per_s) / 1e6:.0f} MB/s, Mooncake alone "
            f"{statistics.median(details.goodput.raw_bytes_per_s) / 1e6:.0f} MB/s"
        )


def unmet(summary: LoadSummary) -> list[str]:
    """What must hold of any run, however fast the machine is."""
    problems = []
    if not summary.tokens_equal:
        problems.append("answers differ between cells: summary.json says in which")
    if summary.store_bytes_when_resident:
        problems.append(f"{summary.store_bytes_when_resident} bytes were read that the decode engine held")
    return problems


def _describe(cell: Cell, sample: Sample) -> str:
    busy = ""
    if sample.storage_utilisation:
        shares = (f"{engine} {share:.1%}" for engine, share in sample.storage_utilisation.items())
        busy = ", storage links busy: " + ", ".join(shares)
    equal = "" if sample.tokens_equal else ", TOKENS DIFFER"
    read = sum(sample.storage_bytes.values()) / 1e6
    return (
        f"{cell.name}: JCT {sample.job_s:.2f} s, TTFT {sample.ttft_s[0]:.2f} s, {read:.1f} MB read, "
        f"{sample.cached_tokens} tokens cached{busy}{equal}"
    )


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
