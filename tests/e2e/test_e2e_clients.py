"""Standard clients through both routers, as `dualpath eval clients` runs them."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from dualpath_sgl.evals.clients import compare
from dualpath_sgl.evals.clients.environment import clients_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
WITHOUT_MESSAGES = {
    "curl /v1/messages",
    "curl /v1/responses",
    "anthropic",
    "aiperf messages",
    "openai responses",
}
LOSSY = {"curl /generate", "curl /v1/chat/completions", "openai echo"}
"""The Rust router takes no batch on /generate, no `stream_options` without a stream, and loses prompts'
log-probabilities."""


@pytest.fixture(scope="module")
def rows(config, one_cluster, tmp_path_factory) -> list[dict]:
    one_cluster.stop()
    out = tmp_path_factory.mktemp("clients")
    asking = compare.clients(config.model.directory(), clients_environment(), None)
    compare.write(compare.compare(config, asking, out, Console()), out)
    print((out / "report.md").read_text())
    return json.loads((out / "summary.json").read_text())


def test_every_client_gets_the_single_servers_tokens_through_the_placing_router(rows):
    mine = [row for row in rows if row["router"] == "placing"]
    assert len(mine) > 10
    assert [row for row in mine if not (row["ok"] and row["tokens_equal"] and row["requests"])] == []


def test_every_benchmark_and_openais_client_get_them_through_the_rust_router(rows):
    mine = [row for row in rows if row["router"] == "rust" and row["client"] not in WITHOUT_MESSAGES | LOSSY]
    assert {"bench_serving", "aiperf weka_trace", "openai"} <= {row["client"] for row in mine}
    assert [row for row in mine if not (row["ok"] and row["tokens_equal"] and row["requests"])] == []


def test_what_the_rust_router_does_not_serve_the_summary_says(rows):
    unable = [row for row in rows if row["router"] == "rust" and row["client"] in WITHOUT_MESSAGES]
    assert [row["ok"] for row in unable] == [False] * len(WITHOUT_MESSAGES)
