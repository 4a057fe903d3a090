"""The demo: real agent sessions over both load paths of a small cluster, every token compared.

The cluster (launch/clusters/demo.yaml) has pools too small for the sessions' contexts, so
most of what a turn needs has to come from the store, on either side.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.console import Console

from dualpath_sgl.evals.agents.trace import SHIPPED
from dualpath_sgl.evals.common.explained import errors, failures_explained
from dualpath_sgl.evals.compare.run import EvalOptions, evaluate
from dualpath_sgl.evals.compare.summary import Summary
from dualpath_sgl.launch.config import CLUSTERS
from dualpath_sgl.launch.config.cluster import load

OUT = Path("results/demo")
TRACE = SHIPPED / "claude-code-weka"
CLUSTER = CLUSTERS / "demo.yaml"
MIN_REQUESTS = 60
MIN_SESSIONS = 4


def main() -> int:
    """Run the demo; 0 only if every condition of `unmet` holds."""
    console = Console(highlight=False)
    if OUT.exists():
        shutil.rmtree(OUT)
    with failures_explained():
        summary = evaluate(
            EvalOptions(
                trace=TRACE,
                cluster=load(CLUSTER),
                modes=("dualpath",),
                agents=18,
                concurrency=4,
                turns=5,
                max_context_tokens=1536,
                seed=1,
                out=OUT,
            ),
            console,
        )
    for problem in unmet(summary):
        errors.print(f"[red]not as it must be:[/] {problem}")
    console.print(
        f"report:  {OUT}/report.md (numbers: {OUT}/summary.json)\n"
        f"traces:  {OUT}/traces.json\n"
        f"  in the terminal:  dualpath trace show --list --file {OUT}/traces.json, "
        "then dualpath trace show ID\n"
        "  in Jaeger:        docker run --rm -p 16686:16686 -p 4317:4317 jaegertracing/jaeger, open "
        "http://localhost:16686, Search, JSON file\n"
        "  live:             set tracing.otlp_endpoint: localhost:4317 in the cluster file",
        soft_wrap=True,
    )
    return 1 if unmet(summary) else 0


def unmet(summary: Summary) -> list[str]:
    """What the demo must show and this summary does not."""
    conditions = {
        "tokens equal to the single server's": summary.tokens_equal,
        f"requests >= {MIN_REQUESTS}": summary.requests >= MIN_REQUESTS,
        f"sessions >= {MIN_SESSIONS}": summary.sessions >= MIN_SESSIONS,
        "a request took the decode path": summary.paths.decode > 0,
        "a request took the prefill path": summary.paths.prefill > 0,
        "the decode engine read the store": summary.store_read_bytes.decode > 0,
        "pages were forwarded": summary.forwarded_bytes > 0,
        "no page was read from the store twice for one request": summary.duplicate_store_pages == 0,
    }
    return [condition for condition, holds in conditions.items() if not holds]
