"""The matrix goes on where it stopped, survives cells that fail, and attaches to what runs already.

The deployment is a stand-in that answers like `/generate`: a real one cannot be made to fail at will.  Real
clusters are run by tests/e2e.
"""

import asyncio
import json
import threading

import pytest
import yaml
from aiohttp import web
from rich.console import Console

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.matrix.command import prepare
from dualpath_sgl.evals.matrix.results import finished_cells, read_cell

QUIET = Console(quiet=True)
LOADS = [
    {"kind": "offline", "agents": 2, "concurrency": 1},
    {"kind": "offline", "agents": 3, "concurrency": 3},
    {"kind": "online", "agents": 3, "agents_per_s": 50.0},
]


class Deployment:
    """Answers in a thread of its own; fails the requests that `breaks` says."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []
        self.breaks = lambda body: False
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._ready.set()
        self._loop.run_forever()

    async def _serve(self) -> None:
        app = web.Application()
        app.router.add_post("/generate", self._generate)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.prompts.append(body["input_ids"])
        if self.breaks(body):
            return web.Response(status=503, text="no engine")
        response = web.StreamResponse()
        await response.prepare(request)
        for count in (1, body["sampling_params"]["max_new_tokens"]):
            event = {"output_ids": list(range(count)), "meta_info": {"cached_tokens": 16}}
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
        return response


@pytest.fixture
def deployment():
    with Deployment() as running:
        yield running


@pytest.fixture
def experiment(tmp_path):
    def write(**changes):
        file = tmp_path / "experiment.yaml"
        content = {
            "name": "stand-in",
            "cluster": "demo.yaml",
            "modes": ["split"],
            "traces": {"coding": {"turns": 2, "max_context": 256}},
            "loads": LOADS,
            "check_tokens": False,
            "sample_s": 0.1,
        }
        file.write_text(yaml.safe_dump(content | changes))
        return file

    return write


def run(file, out, url):
    return prepare(file, out, url, None, QUIET).run()


def test_finished_cells_are_kept_and_only_what_is_new_or_changed_is_run_again(
    deployment, experiment, tmp_path
):
    out = tmp_path / "out"
    assert run(experiment(), out, deployment.url) == []
    cells = list(finished_cells(out))
    assert [len(cell.requests) for cell in cells] == [4, 6, 6]
    assert len(deployment.prompts) == 16 and len(set(map(tuple, deployment.prompts))) == 16
    assert {cell.hit_rate > 0 and cell.tokens_equal is None for cell in cells} == {True}
    before = {file.name: file.read_bytes() for file in (out / "cells").iterdir()}

    assert run(experiment(), out, deployment.url) == []
    assert len(deployment.prompts) == 16
    assert {file.name: file.read_bytes() for file in (out / "cells").iterdir()} == before

    added = {"kind": "offline", "agents": 1, "concurrency": 1}
    assert run(experiment(loads=[*LOADS, added]), out, deployment.url) == []
    assert len(deployment.prompts) == 18
    assert run(experiment(seed=2), out, deployment.url) == []
    assert len(deployment.prompts) == 18 + 16


def test_a_cell_that_fails_is_told_the_others_are_measured_and_it_is_tried_again(
    deployment, experiment, tmp_path
):
    out = tmp_path / "out"
    deployment.breaks = lambda body: len(deployment.prompts) == 6
    (problem,) = run(experiment(), out, deployment.url)
    assert "3-agents-3-at-once" in problem and "HTTP 503" in problem and "no engine" in problem
    assert len(list(finished_cells(out))) == 2
    deployment.breaks = lambda body: False
    deployment.prompts.clear()
    assert run(experiment(), out, deployment.url) == []
    assert len(deployment.prompts) == 6 and len(list(finished_cells(out))) == 3


def test_an_interrupted_run_has_what_was_finished(deployment, experiment, tmp_path, monkeypatch):
    out = tmp_path / "out"
    prepared = prepare(experiment(), out, deployment.url, None, QUIET)
    real = prepared.runner._measure

    def interrupted(cell, target):
        if cell.load.name.startswith("3-agents-3"):
            raise KeyboardInterrupt
        return real(cell, target)

    monkeypatch.setattr(prepared.runner, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepared.run()
    assert len(list(finished_cells(out))) == 1 and prepared.has_cells()


def test_a_capacity_search_keeps_its_probes_until_it_is_done(deployment, experiment, tmp_path):
    out = tmp_path / "out"
    load = {"kind": "capacity", "agents": 2, "first_agents_per_s": 100.0, "precision": 1, "most_probes": 2}
    (problem,) = run(experiment(loads=[load]), out, deployment.url)
    assert "no capacity found with 2 probes" in problem
    (file,) = (out / "probes").iterdir()
    kept = json.loads(file.read_text())["probes"]
    assert [probe["agents_per_s"] for probe in kept] == [100.0, 200.0]
    # The same search goes on: it asks nothing again.
    asked = len(deployment.prompts)
    run(experiment(loads=[load]), out, deployment.url)
    assert len(deployment.prompts) == asked


def test_one_deployment_is_one_mode_and_one_topology(deployment, experiment, tmp_path):
    for changes in ({"modes": ["basic", "split"]}, {"topologies": ["1p1d", "1p2d"]}):
        with pytest.raises(EvalError, match="one mode and one topology"):
            run(experiment(**changes), tmp_path / "out", deployment.url)


def test_contexts_that_no_pool_holds_are_refused_before_anything_runs(deployment, experiment, tmp_path):
    traces = {"coding": {"turns": 2, "max_context": 4096}}
    with pytest.raises(EvalError, match=r"traces.coding.max_context is 4096 .*pool is 2048"):
        run(experiment(traces=traces), tmp_path / "out", deployment.url)
    assert not deployment.prompts


def test_a_run_directory_must_tell_of_the_deployment_that_is_named(experiment, tmp_path):
    with pytest.raises(EvalError, match="without --url"):
        prepare(experiment(), tmp_path / "out", None, tmp_path, QUIET)
    with pytest.raises(EvalError, match="holds no cluster.json"):
        prepare(experiment(), tmp_path / "out", "http://127.0.0.1:1", tmp_path, QUIET)
    state = {"name": "x", "mode": "dualpath", "url": "http://127.0.0.1:2", "scheduler": None}
    (tmp_path / "cluster.json").write_text(json.dumps(state | {"engines": {}, "processes": {}}))
    with pytest.raises(EvalError, match="tells of http://127.0.0.1:2"):
        prepare(experiment(), tmp_path / "out", "http://127.0.0.1:1", tmp_path, QUIET)


def test_a_result_of_another_version_is_told_with_its_file(tmp_path):
    file = tmp_path / "cell.json"
    file.write_text('{"name": "x"}')
    with pytest.raises(EvalError, match=r"cell.json: field .* remove it"):
        read_cell(file)
