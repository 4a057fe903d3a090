"""The command `dualpath trace …`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.common.explained import failures_explained
from dualpath_sgl.evals.spans import requests, scripts, waterfall
from dualpath_sgl.evals.spans.traces import Trace, find, read_traces
from dualpath_sgl.terminal.console import output

RESULTS = Path("results")
SPANS_FILE = "spans.jsonl"
"""In a run directory."""

trace_app = typer.Typer(no_args_is_help=True, help="Look at recorded request traces.")


@trace_app.callback()
def _several_commands() -> None:
    # Without a callback typer drops the name of an app's only command.
    pass


def ids_for_the_shell(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Ids of requests that begin like `incomplete`, and what each was."""
    try:
        traces = read_traces(_file(context.params.get("file"), context.params.get("run_dir")))
    except EvalError:
        return []
    facts = [requests.RequestFacts.of(trace) for trace in traces]
    return [
        (one.trace, f"{one.path or one.mode or ''} {one.place}")
        for one in facts
        if one.request and one.trace.startswith(incomplete.lower())
    ]


@trace_app.command("show")
def show(
    trace_id: Annotated[
        str | None,
        typer.Argument(
            metavar="ID", help="Trace id or its unique beginning.", autocompletion=ids_for_the_shell
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="Jaeger JSON (traces.json) or collected spans (spans.jsonl); default: the newest "
            "results/*/traces.json."
        ),
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Instead of a file: what a cluster of `dualpath up` has recorded.")
    ] = None,
    list_them: Annotated[bool, typer.Option("--list", help="One line per request.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="With --list: probes and warm-ups of engines too.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Every span, with all its attributes.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts; see above.")] = False,
) -> None:
    """Print one request as a waterfall: its spans as a tree, each with a bar over time.

    Output is as wide as the terminal, or as COLUMNS says; a pipe gets
    120 columns and no colours.

    --json prints one object; null is unknown. Of a request:

    - trace, request (false: a probe), mode, room (text), session, turn
    - path: none, prefill, decode, split, resident or relay
    - prompt_tokens, cached_tokens, output_tokens, ttft_s, duration_s
    - store_read_bytes, forwarded_bytes, relayed_bytes, fallbacks (list),
      spans, services
    - tree: list of id, parent, name, service, start_s, duration_s,
      attributes

    With --list: file, and traces, each as above without tree.
    """
    with failures_explained():
        if not list_them and trace_id is None:
            raise EvalError("ID is missing; give a trace id or its beginning, or --list to see them")
        source = _file(file, run_dir)
        traces = read_traces(source)
        if list_them:
            _list(source, traces, everything, as_json)
        else:
            trace = find(traces, trace_id or "")
            if as_json:
                print(scripts.trace_document(trace).model_dump_json(indent=2))
            else:
                waterfall.show(trace, output(), verbose)


def _list(source: Path, traces: list[Trace], everything: bool, as_json: bool) -> None:
    if as_json:
        print(scripts.list_document(str(source), traces, everything).model_dump_json(indent=2))
        return
    console = output()
    requests.list_requests(traces, console, everything)
    console.print(f"one of them: dualpath trace show ID   from {source}", style="dim", soft_wrap=True)


def _file(file: Path | None, run_dir: Path | None) -> Path:
    """Where the traces are.  Raises EvalError."""
    if run_dir is not None:
        if file is not None:
            raise EvalError("--file and --run-dir both say where the traces are; give one of them")
        spans = run_dir / SPANS_FILE
        if not spans.exists():
            raise EvalError(
                f"--run-dir {run_dir}: holds no {SPANS_FILE}; name a run directory of `dualpath up` whose "
                "cluster file has tracing.enabled: true"
            )
        return spans
    return file or _newest_traces()


def _newest_traces() -> Path:
    found = sorted(RESULTS.glob("*/traces.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise EvalError(
            f"no {RESULTS}/*/traces.json here; run `dualpath demo` or `dualpath eval run` first, or give "
            "--file or --run-dir"
        )
    return found[-1]
