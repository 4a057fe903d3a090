"""The report: one HTML file that holds everything, and its plots as PNG files beside it."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment as Templates
from jinja2 import FileSystemLoader, StrictUndefined

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.matrix import results
from dualpath_sgl.evals.matrix.cells import cells
from dualpath_sgl.evals.matrix.environment import Environment
from dualpath_sgl.evals.matrix.experiment import Experiment
from dualpath_sgl.evals.matrix.results import CellResult, Failures, finished_cells
from dualpath_sgl.evals.report import latency, links, sharing, story, throughput, times
from dualpath_sgl.evals.report.groups import Comparison, by_work, comparisons, modes_of
from dualpath_sgl.evals.report.story import Told
from dualpath_sgl.evals.report.style import Picture
from dualpath_sgl.terminal.units import size

FOLDER = "report"
PAGE = "index.html"
_TEMPLATE = "page.html.j2"


class Work(NamedTuple):
    """What was done with one load of one trace, on all topologies."""

    title: str
    about: str
    gains: list[Told]
    costs: list[Told]
    pictures: list[tuple[str, Picture]]
    """(caption, picture)"""


def write_report(out: Path) -> Path:
    """Draw what the result folder `out` holds so far; the page's path.  Raises EvalError."""
    experiment, found = _read(out)
    folder = out / FOLDER
    folder.mkdir(exist_ok=True)
    compared = comparisons(found)
    works = list(_works(compared, experiment))
    across = list(_across(compared, experiment))
    for _, picture in [entry for work in works for entry in work.pictures] + across:
        (folder / f"{picture.name}.png").write_bytes(picture.light)
        (folder / f"{picture.name}-dark.png").write_bytes(picture.dark)
    page = folder / PAGE
    page.write_text(_render(out, experiment, found, compared, works, across), encoding="utf-8")
    return page


def _read(out: Path) -> tuple[Experiment, list[CellResult]]:
    file = out / results.EXPERIMENT_READ
    try:
        experiment = Experiment.model_validate_json(file.read_bytes())
    except OSError as error:
        raise EvalError(f"{file}: {error.strerror}; name a result folder of `dualpath eval matrix`") from None
    except ValueError as error:
        raise EvalError(f"{file}: was written by another version ({error}); run the matrix again") from None
    order = {cell.name: place for place, cell in enumerate(cells(experiment))}
    found = [cell for cell in finished_cells(out) if cell.name in order]
    if not found:
        raise EvalError(
            f"{out / results.CELLS}: no cell of {experiment.name} is finished yet; run the matrix first"
        )
    return experiment, sorted(found, key=lambda cell: order[cell.name])


def _works(compared: Sequence[Comparison], experiment: Experiment) -> Iterator[Work]:
    modes = modes_of(compared)
    for place, ((trace, load), found) in enumerate(by_work(compared), 1):
        is_search = found[0].any.kind == "capacity"
        yield Work(
            title=f"{trace}, {load.replace('-', ' ')}",
            about=_about(found[0].any),
            gains=[] if is_search else [told for c in found if (told := story.gains(c)).lines],
            costs=[] if is_search else [told for c in found if (told := story.costs(c)).lines],
            pictures=[
                (caption, picture)
                for caption, picture in _pictures(f"{place:02d}", found, modes, experiment, is_search)
                if picture is not None
            ],
        )


def _pictures(
    number: str, found: list[Comparison], modes: list[str], experiment: Experiment, is_search: bool
) -> Iterator[tuple[str, Picture | None]]:
    level = experiment.service_level
    if is_search:
        yield (
            "Capacity: mean TTFT at every probed rate of arriving agents; filled where the service level was kept. "
            "Dotted: the highest rate that keeps it.",
            throughput.capacity(f"{number}-capacity", found, modes, level),
        )
        return
    yield (
        "Job completion time: all requests, from the first one's start to the last one's end. The red mark is "
        "what the storage links alone need for the bytes read, spread evenly over all engines that may read.",
        times.jct(f"{number}-jct", found, modes),
    )
    yield (
        "Storage links in time. Where only the prefill engine reads, the decode engines' links idle; the idea of "
        "DualPath is to use them too.",
        links.busy(f"{number}-links", found),
    )
    yield "Load paths in time, as the scheduler planned them.", links.paths(f"{number}-paths", found)
    yield (
        "Latencies of single requests. Read upwards: at 50% stands the median. Further left is better. Tokens that "
        "arrive together have no time between them: some routers hold the first ones back.",
        latency.distributions(f"{number}-latency", found, modes, level),
    )
    yield (
        "Left: bytes read from the store by engine; max/avg is the engine that read most over the mean, 1 is even. "
        "Right: prompt tokens that need not be computed, beside what an infinite cache would give.",
        sharing.reads_and_hits(f"{number}-reads", found, modes),
    )


def _across(compared: Sequence[Comparison], experiment: Experiment) -> Iterator[tuple[str, Picture]]:
    modes, level = modes_of(compared), experiment.service_level
    for trace in dict.fromkeys(c.trace for c in compared):
        found = [c for c in compared if c.trace == trace]
        for kind in ("offline", "online"):
            if picture := throughput.against_load(f"load-{trace}-{kind}", kind, found, modes, level):
                yield (
                    f"{trace}: what is served, and how long the first token takes, against the load.",
                    picture,
                )
    for field in ("append", "generation"):
        if picture := throughput.sweep(f"sweep-{field}", field, compared, modes):
            yield (
                f"What longer or shorter {field} lengths change: how many times as fast as the first mode.",
                picture,
            )


def _about(cell: CellResult) -> str:
    traffic = cell.traffic
    parts = [
        f"{traffic.requests} requests of {traffic.sessions} agents from {traffic.source} ({traffic.format})",
        f"lengths scaled by {traffic.scale_factor:.3g}, longest prompt with answer {traffic.longest_tokens} tokens",
    ]
    if traffic.raw_hit_rate is not None and traffic.hit_rate is not None:
        parts.append(
            f"theoretical hit rate {traffic.hit_rate:.1%} as replayed, {traffic.raw_hit_rate:.1%} in the trace"
        )
    if cell.link_bits_per_s:
        parts.append(f"storage links of {cell.link_bits_per_s / 1e6:g} Mbit/s")
    return "; ".join(parts) + f"; seed {traffic.seed}."


def _render(
    out: Path,
    experiment: Experiment,
    found: list[CellResult],
    compared: list[Comparison],
    works: list[Work],
    across: list[tuple[str, Picture]],
) -> str:
    templates = Templates(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    templates.filters["data"] = lambda png: "data:image/png;base64," + base64.b64encode(png).decode()
    environment = Environment.model_validate_json((out / results.ENVIRONMENT).read_bytes())
    failures = _failures(out)
    modes = modes_of(compared)
    missing = len(list(cells(experiment))) - len(found)
    rendered: str = templates.get_template(_TEMPLATE).render(
        experiment=experiment,
        cards=list(story.cards(compared)),
        works=works,
        across=across,
        modes=[(mode, story.MODES.get(mode, "")) for mode in modes],
        columns=story.COLUMNS,
        rows=[story.row(comparison, mode) for comparison in compared for mode in comparison.modes],
        wrong=[cell.name for cell in found if cell.tokens_equal is False],
        missing=missing,
        failures=failures.failures,
        finished=datetime.fromisoformat(max(cell.finished_at for cell in found)).strftime(
            "%d %B %Y, %H:%M UTC"
        ),
        is_cpu=not environment.gpus,
        environment=environment,
        memory=size(environment.memory_bytes),
        seeds=sorted({cell.traffic.seed for cell in found}),
        yaml=(out / results.EXPERIMENT).read_text(encoding="utf-8"),
    )
    return rendered


def _failures(out: Path) -> Failures:
    file = out / results.FAILURES
    return Failures.model_validate_json(file.read_bytes()) if file.exists() else Failures()
