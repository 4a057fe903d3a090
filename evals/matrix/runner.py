"""Runs the cells of an experiment that are not finished yet, and writes each when it is done.

    out/cells/NAME.json        one finished cell
    out/probes/NAME.json       probes of a capacity search that is not finished
    out/references/NAME.json   a single server's answers, the same for all modes
    out/clusters/NAME/         logs and spans of each cluster
    out/failures.json          cells that were tried in vain; they are tried again the next time

All cells of one mode on one topology share a cluster: its pools are emptied between them, and every cell has
tokens of its own.  A cell that fails does not end the experiment; its cluster is replaced.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel
from rich.console import Console

from dualpath_sgl.evals.agents.replay import Pace, Replay, RequestRecord, replay
from dualpath_sgl.evals.agents.talk import Answer
from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.compare.run import link_rate, mismatched, storage_limit_s
from dualpath_sgl.evals.compare.summary import EngineRead
from dualpath_sgl.evals.matrix import results
from dualpath_sgl.evals.matrix.cells import Cell, cells, counts, fingerprint
from dualpath_sgl.evals.matrix.experiment import CapacityLoad, Experiment, OfflineLoad, OnlineLoad
from dualpath_sgl.evals.matrix.modes import cluster_of
from dualpath_sgl.evals.matrix.probing import StopRule, search
from dualpath_sgl.evals.matrix.results import CellResult, Failure, Failures, Probe, Request, Samples
from dualpath_sgl.evals.matrix.sampling import Sampler
from dualpath_sgl.evals.matrix.target import Attached, OwnCluster, Target
from dualpath_sgl.evals.matrix.workloads import Play, pace, play, seed_of
from dualpath_sgl.launch.config.cluster import ClusterConfig, Mode
from dualpath_sgl.launch.processes.environment import forget_foreign_tracing
from dualpath_sgl.launch.processes.process import ProcessDied
from dualpath_sgl.launch.supervision.cluster import Cluster
from dualpath_sgl.launch.supervision.readiness import require_ready
from dualpath_sgl.launch.supervision.single_server import SingleServer
from dualpath_sgl.launch.supervision.supervisor import StartTimeout
from scheduler_svc.telemetry.tracing import init_tracing, shutdown

REFERENCE_CONCURRENCY = 4
QUIET_REPORT_REQUESTS = 20
_RECOVERABLE = (EvalError, ProcessDied, StartTimeout, OSError)


class Answers(BaseModel):
    """A single server's, by session and turn."""

    fingerprint: str
    answers: dict[str, list[list[int] | str]]


class Probes(BaseModel):
    fingerprint: str
    probes: list[Probe]


class Measured(NamedTuple):
    replay: Replay
    samples: Samples
    probes: list[Probe]
    agents_per_s: float | None


class Runner:
    """One experiment in one result folder.

    `attached` is a deployment that runs already: then nothing is started but the single server.
    """

    def __init__(
        self,
        experiment: Experiment,
        cluster: ClusterConfig,
        out: Path,
        console: Console,
        attached: Attached | None = None,
    ) -> None:
        self._experiment = experiment
        self._base = cluster
        self._out = out
        self._console = console
        self._attached = attached
        self._plays: dict[str, Play] = {}
        self._vocab_size = _vocab_size(cluster)

    def run(self) -> Failures:
        """Raises EvalError for what is wrong with the experiment, NotReady when this machine cannot run it."""
        forget_foreign_tracing(os.environ)
        wanted = list(cells(self._experiment))
        self._check(wanted)
        open_cells = [cell for cell in wanted if not self._is_finished(cell)]
        self._say(f"{len(wanted)} cells, {len(wanted) - len(open_cells)} of them finished before")
        failures: list[Failure] = []
        if open_cells and self._experiment.check_tokens:
            self._references(open_cells)
        for (topology, mode), group in groupby(open_cells, lambda cell: (cell.topology, cell.mode)):
            failures += self._group(topology, mode, list(group))
            results.write(Failures(failures=failures), self._out / results.FAILURES)
        results.write(Failures(failures=failures), self._out / results.FAILURES)
        return Failures(failures=failures)

    def _group(self, topology: str, mode: str, todo: list[Cell]) -> Iterator[Failure]:
        """The cells of one cluster.  One that fails takes its cluster with it; the next ones get another."""
        while todo:
            tried = list(todo)  # if it does not even start, all of them fail
            try:
                with self._target(topology, mode, todo) as target:
                    while todo:
                        tried = todo[:1]
                        self._cell(todo[0], target)
                        todo.pop(0)
            except _RECOVERABLE as error:
                problem = str(error) or type(error).__name__
                for cell in tried:
                    todo.remove(cell)
                    self._say(f"{cell.name}: FAILED: {problem.splitlines()[0]}")
                    yield Failure(cell=cell.name, problem=problem)

    # -- what is wanted --------------------------------------------------------------------------------

    def _check(self, wanted: list[Cell]) -> None:
        for cell in wanted:
            pools = (self._base.prefill.max_total_tokens, self._base.decode.max_total_tokens)
            pool = min((pool for pool in pools if pool is not None), default=None)
            if pool is not None and cell.trace.choice.max_context > pool:
                raise EvalError(
                    f"traces.{cell.trace.name}.max_context is {cell.trace.choice.max_context} tokens, but the "
                    f"cluster's smallest pool is {pool} (max_total_tokens); lower the one or raise the other"
                )
        if self._attached is not None:
            if len({(cell.topology, cell.mode) for cell in wanted}) > 1:
                raise EvalError(
                    "with --url there is one deployment: give the experiment one mode and one topology, "
                    "which name it in the report"
                )
            return
        for topology, mode in dict.fromkeys((cell.topology, cell.mode) for cell in wanted):
            require_ready(self._config(next(c for c in wanted if (c.topology, c.mode) == (topology, mode))))

    def _config(self, cell: Cell, context_tokens: int = 0) -> ClusterConfig:
        return cluster_of(self._base, cell.mode, *counts(cell), context_tokens)

    def _play(self, cell: Cell) -> Play:
        if cell.traffic_name not in self._plays:
            seed = cell.seed(self._experiment)
            self._plays[cell.traffic_name] = play(cell.trace, cell.load.agents, self._base, seed)
        return self._plays[cell.traffic_name]

    def _fingerprint(self, cell: Cell) -> str:
        url = None if self._attached is None else self._attached.url
        return fingerprint(cell, self._experiment, self._base, url)

    def _file(self, folder: str, name: str) -> Path:
        return self._out / folder / f"{name}.json"

    def _is_finished(self, cell: Cell) -> bool:
        file = self._file(results.CELLS, cell.name)
        return file.exists() and results.read_cell(file).fingerprint == self._fingerprint(cell)

    # -- what answers must be --------------------------------------------------------------------------

    def _references(self, open_cells: list[Cell]) -> None:
        """Play what all modes will play on a single server, as far as that is not known yet."""
        missing = {
            cell.traffic_name: cell
            for cell in open_cells
            if not isinstance(cell.load, CapacityLoad) and self._expected(cell) is None
        }
        if not missing:
            return
        self._say(f"single server: {len(missing)} workloads")
        server = SingleServer(self._base, self._out / "clusters" / "single")
        server.start(lambda text: self._say(f"single server: {text}"))
        with server:
            for name, cell in missing.items():
                answers = self._replay(
                    cell, self._play(cell), server.url, Pace(concurrency=REFERENCE_CONCURRENCY), None
                ).answers
                found = Answers(fingerprint=self._reference_fingerprint(cell), answers=answers)
                results.write(found, self._file(results.REFERENCES, name))

    def _reference_fingerprint(self, cell: Cell) -> str:
        load = {"agents": cell.load.agents}
        depends_on = [self._base.model.model_dump(mode="json"), self._base.page_size, load]
        trace = cell.trace.choice.model_dump(mode="json", exclude={"append", "generation"})
        depends_on += [trace, cell.trace.append, cell.trace.generation, cell.seed(self._experiment)]
        return f"{seed_of(json.dumps(depends_on, sort_keys=True)):08x}"

    def _expected(self, cell: Cell) -> dict[str, list[Answer]] | None:
        file = self._file(results.REFERENCES, cell.traffic_name)
        if not file.exists():
            return None
        known = Answers.model_validate_json(file.read_bytes())
        return known.answers if known.fingerprint == self._reference_fingerprint(cell) else None

    # -- running ---------------------------------------------------------------------------------------

    @contextmanager
    def _target(self, topology: str, mode: str, group: list[Cell]) -> Iterator[Target]:
        if self._attached is not None:
            yield self._attached
            return
        name = f"{topology}--{mode}"
        context_tokens = max(self._play(cell).traffic.new_tokens for cell in group)
        cluster = Cluster(self._config(group[0], context_tokens), self._out / "clusters" / name)
        cluster.start(lambda text: self._say(f"{name}: {text}") if "ready after" in text else None)
        with cluster:
            yield OwnCluster(cluster)

    def _cell(self, cell: Cell, target: Target) -> None:
        target.forget()
        before = target.settled()
        try:
            measured = self._measure(cell, target)
        except EvalError:
            target.explain()
            raise
        counted = target.settled().since(before)
        found = self._result(
            cell, measured, counted.engines, counted.fallbacks, counted.duplicate_store_pages
        )
        results.write(found, self._file(results.CELLS, cell.name))
        self._file("probes", cell.name).unlink(missing_ok=True)
        told = (
            ""
            if found.tokens_equal is None
            else ", tokens equal"
            if found.tokens_equal
            else ", TOKENS DIFFER"
        )
        self._say(f"{cell.name}: {len(found.requests)} requests in {found.job_s:.1f} s{told}")

    def _measure(self, cell: Cell, target: Target) -> Measured:
        load = cell.load
        with Sampler(target, self._experiment.sample_s) as sampler:
            if isinstance(load, CapacityLoad):
                rate, run, probes = self._search(cell, load, target)
                return Measured(run, sampler.samples, probes, rate)
            timing = pace(load, load.agents, cell.seed(self._experiment))
            run = self._replay(cell, self._play(cell), target.url, timing, target.collector)
        return Measured(run, sampler.samples, [], load.agents_per_s if isinstance(load, OnlineLoad) else None)

    def _search(self, cell: Cell, load: CapacityLoad, target: Target) -> tuple[float, Replay, list[Probe]]:
        """The rate found, the last run that kept the level, and all probes."""
        file = self._file("probes", cell.name)
        kept = Probes(fingerprint=self._fingerprint(cell), probes=[])
        if file.exists():
            before = Probes.model_validate_json(file.read_bytes())
            kept = before if before.fingerprint == kept.fingerprint else kept
        last = Replay([], {}, 0.0)

        def run(agents_per_s: float, rule: StopRule) -> Replay:
            nonlocal last
            target.forget()
            # New tokens for every probe: nothing of one is found by the next.
            seed = seed_of(cell.seed(self._experiment), f"{agents_per_s:.6g}")
            timing = pace(load, load.agents, seed, agents_per_s)
            found = self._replay(cell, self._play(cell), target.url, timing, target.collector, seed, rule)
            if rule.verdict()[0]:
                last = found
            return found

        def on_probe(probe: Probe) -> None:
            kept.probes.append(probe)
            results.write(kept, file)
            verdict = "kept" if probe.met else "not kept"
            self._say(f"{cell.name}: {probe.agents_per_s:.3g} agents/s {verdict} ({probe.why})")

        rate = search(load, self._experiment.service_level, list(kept.probes), run, on_probe)
        return rate, last, kept.probes

    def _replay(
        self,
        cell: Cell,
        played: Play,
        url: str,
        timing: Pace,
        collector: str | None,
        seed: int | None = None,
        rule: StopRule | None = None,
    ) -> Replay:
        done = 0

        def on_request(record: RequestRecord) -> None:
            nonlocal done
            done += 1
            if done % QUIET_REPORT_REQUESTS == 0:
                self._say(f"{cell.name}: {done} of {played.workload.requests} requests")

        tracer = init_tracing("dualpath-client", collector, {"dualpath.mode": cell.mode})
        try:
            return replay(
                played.workload,
                url,
                pace=timing,
                vocab_size=self._vocab_size,
                seed=cell.seed(self._experiment) if seed is None else seed,
                tracer=tracer,
                on_request=on_request,
                until=rule or (lambda record: False),
            )
        finally:
            shutdown()

    def _result(
        self,
        cell: Cell,
        measured: Measured,
        engines: dict[str, EngineRead],
        fallbacks: dict[str, int],
        duplicates: int | None,
    ) -> CellResult:
        config = self._config(cell)
        expected = self._expected(cell) if self._experiment.check_tokens else None
        wrong = [] if expected is None else list(mismatched(expected, measured.replay.answers))
        read = sum(engine.store_read_bytes for engine in engines.values())
        is_planned = config.mode not in (Mode.BASIC, Mode.BOTH)
        return CellResult(
            name=cell.name,
            fingerprint=self._fingerprint(cell),
            mode=cell.mode,
            cluster_mode=config.mode.value,
            policy=config.scheduler.policy if is_planned else None,
            topology=cell.topology,
            trace=cell.trace.name,
            append=cell.trace.append,
            generation=cell.trace.generation,
            load=cell.load.name,
            kind=cell.load.kind,
            concurrency=cell.load.concurrency if isinstance(cell.load, OfflineLoad) else None,
            agents_per_s=measured.agents_per_s,
            repetition=cell.repetition,
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
            traffic=self._play(cell).traffic,
            tokens_equal=None if expected is None else not wrong,
            mismatches=wrong,
            job_s=measured.replay.job_s,
            storage_limit_s=None if measured.probes else storage_limit_s(config, read),
            link_bits_per_s=link_rate(config),
            requests=[Request(**record._asdict()) for record in measured.replay.records],
            engines=engines,
            fallbacks=fallbacks,
            duplicate_store_pages=duplicates,
            samples=measured.samples,
            probes=measured.probes,
        )

    def _say(self, text: str) -> None:
        self._console.print(f"{datetime.now():%H:%M:%S}  {text}", soft_wrap=True, markup=False)


def _vocab_size(config: ClusterConfig) -> int:
    model = json.loads((config.model.directory() / "config.json").read_text())
    return model.get("text_config", model)["vocab_size"]
