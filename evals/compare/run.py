"""One evaluation: the same workload against a single server and against each mode's cluster.

The single server's tokens are the reference.  The loop is closed (each prompt holds the answers
before it), so equal answers mean that the prompts were equal too.  Every mode gets a fresh
cluster with an empty store; counters are differences over the replay, without warm-up requests.

Written to `out`: `summary.json` (evals/compare/summary.py), `report.md`, `traces.json` (Jaeger's form),
and per mode a folder with the cluster's logs and spans and `requests.jsonl`, one line a request.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from opentelemetry.trace import Tracer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from dualpath_sgl.evals.agents import table2
from dualpath_sgl.evals.agents.replay import Pace, Replay, ReplayError, RequestRecord, replay
from dualpath_sgl.evals.agents.talk import Answer
from dualpath_sgl.evals.agents.trace import load_sessions
from dualpath_sgl.evals.agents.workload import Workload, build
from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.compare import measure, report
from dualpath_sgl.evals.compare.summary import ByRole, Mismatch, ModeResult, PathCounts, Summary, WorkloadInfo
from dualpath_sgl.evals.spans import jaeger
from dualpath_sgl.launch.config.cluster import ClusterConfig, Mode, bits_per_s
from dualpath_sgl.launch.processes.environment import forget_foreign_tracing
from dualpath_sgl.launch.supervision.cluster import Cluster
from dualpath_sgl.launch.supervision.readiness import require_ready
from dualpath_sgl.launch.supervision.single_server import SingleServer
from scheduler_svc.policies.path_policies import PATH_POLICIES
from scheduler_svc.telemetry.tracing import init_tracing, shutdown

DUALPATH = "dualpath"
MODES: tuple[str, ...] = (
    *(mode.value for mode in (Mode.BASIC, Mode.BOTH)),
    DUALPATH,
    *(mode.value for mode in (Mode.RELAY, Mode.DECODE_SIDE)),
    *PATH_POLICIES,
)
"""`basic` and `both` are upstream; `dualpath` takes mode and path policy of the cluster file; a policy's name
takes that policy with decode-side loads."""
SYNTHETIC_ROW = "32k"
QUIET_REPORT_REQUESTS = 20
"""Requests between two lines of progress where there is no terminal."""


@dataclass(frozen=True)
class EvalOptions:
    trace: Path | None
    """A trace file or a directory of them; None: synthetic sessions after the paper's Table 2."""
    cluster: ClusterConfig
    modes: tuple[str, ...]
    agents: int
    concurrency: int
    turns: int | None
    max_context_tokens: int
    seed: int
    out: Path


def evaluate(options: EvalOptions, console: Console) -> Summary:
    """Run the evaluation and write its results.  Raises EvalError on bad options or a failed request."""
    _check(options)
    forget_foreign_tracing(os.environ)
    workload = _workload(options)
    info = _describe(options, workload)
    console.print(
        f"{info.source}: {info.sessions} sessions, {info.requests} requests a mode, scaled by "
        f"{info.scale_factor:.4g}, theoretical hit rate {info.hit_rate:.1%} (raw {info.raw_hit_rate:.1%})"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    with _progress(console) as progress:
        expected = _reference(options, workload, progress)
        results = {}
        span_files = []
        for mode in options.modes:
            results[mode], spans = _run_mode(mode, options, workload, expected, progress)
            span_files += [spans] if spans else []
    # First what was measured: spans come from many processes, and a killed one leaves half of them.
    _write(Summary.of(info, results, traces=0), options.out)
    summary = Summary.of(info, results, _convert(span_files, options.out / "traces.json", console))
    _write(summary, options.out)
    return summary


def _write(summary: Summary, out: Path) -> None:
    (out / "summary.json").write_text(summary.model_dump_json(indent=2) + "\n")
    (out / "report.md").write_text(report.markdown(summary))


def _convert(span_files: list[Path], out: Path, console: Console) -> int:
    """Traces written to `out`; 0 with the reason on the console when spans cannot be read at all."""
    skipped: list[str] = []
    try:
        traces = jaeger.convert(span_files, out, skipped) if span_files else 0
    except (EvalError, OSError) as error:
        console.print(f"no traces: {error}", markup=False)
        return 0
    if skipped:
        console.print(f"{len(skipped)} broken span lines left out, the first: {skipped[0]}", markup=False)
    return traces


def cluster_config(base: ClusterConfig, mode: str) -> ClusterConfig:
    """The cluster of a mode."""
    if mode in PATH_POLICIES:
        scheduler = base.scheduler.model_copy(update={"policy": mode})
        return base.model_copy(update={"mode": Mode.DECODE_SIDE, "scheduler": scheduler})
    if mode == DUALPATH:
        return base
    return base.model_copy(update={"mode": Mode(mode)})


def _check(options: EvalOptions) -> None:
    for mode in options.modes:
        if mode not in MODES:
            raise EvalError(f"mode is {mode!r}; choose from {', '.join(MODES)}")
    if not options.modes or len(set(options.modes)) != len(options.modes):
        raise EvalError(f"modes are {', '.join(options.modes) or 'none'}; name each wanted mode once")
    if options.out.exists() and any(options.out.iterdir()):
        raise EvalError(f"out is {options.out}, which is not empty; name another folder or remove it")
    for role, group in (("prefill", options.cluster.prefill), ("decode", options.cluster.decode)):
        pool = group.max_total_tokens
        if pool is not None and options.max_context_tokens > pool:
            raise EvalError(
                f"max context is {options.max_context_tokens} tokens, but {role}.max_total_tokens is {pool}; "
                "lower the one or raise the other"
            )
    for mode in options.modes:
        require_ready(cluster_config(options.cluster, mode))


def _workload(options: EvalOptions) -> Workload:
    if options.trace is None:
        sessions = table2.trajectories(table2.ROWS[SYNTHETIC_ROW], options.agents, options.seed)
    else:
        sessions = load_sessions(options.trace)
    return build(
        sessions,
        agents=options.agents,
        turns=options.turns,
        max_context_tokens=options.max_context_tokens,
        page_size=options.cluster.page_size,
    )


def _describe(options: EvalOptions, workload: Workload) -> WorkloadInfo:
    turns = [turn for session in workload.sessions for turn in session.turns]
    synthetic = f"synthetic sessions after the paper's Table 2, row {SYNTHETIC_ROW}"
    return WorkloadInfo(
        source=str(options.trace) if options.trace else synthetic,
        sessions=len(workload.sessions),
        requests=len(turns),
        scale_factor=workload.factor,
        longest_tokens=workload.longest_tokens,
        prompt_tokens=sum(turn.prompt_tokens for turn in turns),
        output_tokens=sum(turn.output_tokens for turn in turns),
        raw_hit_rate=workload.raw_hit_rate,
        hit_rate=workload.hit_rate,
        page_size=workload.page_size,
        concurrency=options.concurrency,
        seed=options.seed,
    )


def _reference(options: EvalOptions, workload: Workload, progress: _Steps) -> dict[str, list[Answer]]:
    with progress.step("single server", workload.requests) as step:
        server = SingleServer(options.cluster, options.out / "single")
        server.start(step.event)
        with server:
            tracer = init_tracing("dualpath-client", None)
            return _replay(options, workload, server.url, tracer, step).answers


def _run_mode(
    mode: str,
    options: EvalOptions,
    workload: Workload,
    expected: dict[str, list[Answer]],
    progress: _Steps,
) -> tuple[ModeResult, Path | None]:
    config = cluster_config(options.cluster, mode)
    folder = options.out / mode
    cluster = Cluster(config, folder)
    with progress.step(mode, workload.requests) as step:
        cluster.start(step.event)
        with cluster:
            collector = cluster.collector_url if config.tracing.enabled else None
            tracer = init_tracing("dualpath-client", collector, {"dualpath.mode": mode})
            before = measure.of(cluster)
            try:
                run = _replay(options, workload, cluster.url, tracer, step)
            except ReplayError:
                cluster.check()  # A dead engine explains more than the HTTP error it caused.
                raise
            finally:
                shutdown()
            counters = measure.of(cluster).since(before)
    with (folder / "requests.jsonl").open("w") as lines:
        lines.writelines(json.dumps(record._asdict()) + "\n" for record in run.records)
    spans = cluster.spans_path if config.tracing.enabled else None
    return _result(mode, cluster.config, run, counters, expected), spans


def _replay(options: EvalOptions, workload: Workload, url: str, tracer: Tracer, step: _Step) -> Replay:
    return replay(
        workload,
        url,
        pace=Pace(concurrency=options.concurrency),
        vocab_size=_vocab_size(options.cluster),
        seed=options.seed,
        tracer=tracer,
        on_request=step.request,
    )


def _vocab_size(config: ClusterConfig) -> int:
    model = json.loads((config.model.directory() / "config.json").read_text())
    return model.get("text_config", model)["vocab_size"]


def _result(
    mode: str,
    config: ClusterConfig,
    run: Replay,
    counters: measure.Counters,
    expected: dict[str, list[Answer]],
) -> ModeResult:
    mismatches = list(mismatched(expected, run.answers))
    records = run.records
    by_role = {
        role: sum(read.store_read_bytes for read in counters.engines.values() if read.role == role)
        for role in ByRole.model_fields
    }
    return ModeResult(
        mode=mode,
        cluster_mode=config.mode.value,
        policy=config.scheduler.policy if config.mode is Mode.DECODE_SIDE else None,
        tokens_equal=not mismatches,
        mismatches=mismatches,
        requests=len(records),
        sessions=len(run.answers),
        job_s=run.job_s,
        storage_limit_s=storage_limit_s(config, sum(by_role.values())),
        ttft_s=measure.quantiles([record.ttft_s for record in records]),
        ttst_s=measure.quantiles([record.ttst_s for record in records if record.ttst_s is not None]),
        tpot_s=measure.quantiles([record.tpot_s for record in records if record.tpot_s is not None]),
        e2e_s=measure.quantiles([record.e2e_s for record in records]),
        hit_rate=sum(record.cached_tokens for record in records)
        / sum(record.prompt_tokens for record in records),
        engines=counters.engines,
        store_read_bytes=ByRole(**by_role),
        forwarded_bytes=sum(read.forwarded_bytes for read in counters.engines.values()),
        paths=PathCounts(**counters.paths),
        fallbacks=counters.fallbacks,
        duplicate_store_pages=counters.duplicate_store_pages,
    )


def storage_limit_s(config: ClusterConfig, count_bytes: int) -> float | None:
    """What the storage links need for `count_bytes` when all engines that may read share them evenly."""
    rate = link_rate(config)
    if rate is None:
        return None
    decoding = config.decode.count if config.mode in (Mode.BOTH, Mode.DECODE_SIDE) else 0
    readers = config.prefill.count + max(decoding, len(config.relay_names))
    return count_bytes * 8 / rate / readers


def link_rate(config: ClusterConfig) -> int | None:
    """Bits per second at which one engine reads the store at most; None: nothing says."""
    network = config.network.storage_rate if config.network is not None else None
    rates = [bits_per_s(rate) for rate in (config.store.read_rate, network) if rate is not None]
    return min(rates, default=None)


def mismatched(expected: dict[str, list[Answer]], got: dict[str, list[Answer]]) -> Iterator[Mismatch]:
    """The first wrong turn of each session; later ones had other prompts already."""
    for session, answers in expected.items():
        for turn, (wanted, found) in enumerate(zip(answers, got[session], strict=True)):
            if wanted != found:
                yield Mismatch(session=session, turn=turn, expected=wanted, got=found)
                break


class _Step:
    """One line of the progress display; where there is no terminal, a line of text now and then."""

    def __init__(self, progress: Progress, name: str, requests: int):
        self._progress = progress
        self._name = name
        self._requests = requests
        self._done = 0
        self._task = progress.add_task(name, total=requests, state="starting")

    def event(self, text: str) -> None:
        self._progress.update(self._task, state=text)
        self._say(text)

    def request(self, record: RequestRecord) -> None:
        self._done += 1
        self._progress.update(self._task, completed=self._done, state=f"{record.session} turn {record.turn}")
        if self._done % QUIET_REPORT_REQUESTS == 0:
            self._say(f"{self._done} of {self._requests} requests")

    def close(self, state: str) -> None:
        self._progress.update(self._task, state=state)
        self._progress.stop_task(self._task)

    def _say(self, text: str) -> None:
        if not self._progress.console.is_terminal:
            self._progress.console.print(f"{self._name}: {text}", soft_wrap=True, markup=False)


class _Steps:
    def __init__(self, progress: Progress):
        self._progress = progress

    @contextmanager
    def step(self, name: str, requests: int) -> Iterator[_Step]:
        step = _Step(self._progress, name, requests)
        try:
            yield step
        except BaseException:
            step.close("failed")
            raise
        step.close("done")


@contextmanager
def _progress(console: Console) -> Iterator[_Steps]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:14}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[state]}", style="dim"),
    )
    with Progress(*columns, console=console) as progress:
        yield _Steps(progress)
