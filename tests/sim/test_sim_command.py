"""`dualpath sim`: what a person sees."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from dualpath_sgl.evals.sim.studies import absolute, figures, paper
from dualpath_sgl.evals.sim.studies.bench import Bench
from dualpath_sgl.evals.sim.studies.command import sim_app
from dualpath_sgl.evals.sim.studies.figures import Figure
from dualpath_sgl.evals.sim.studies.sensitivity import variations

TINY = paper.Size((12,), 16, 12, ("32k",), 12, 2, 12, None, None)


def run(*arguments: str):
    return CliRunner().invoke(sim_app, ["run", *arguments])


def test_run_compares_modes_with_the_first_one():
    found = run("--model", "ds-27b", "--prefill-nodes", "1", "--decode-nodes", "1", "--agents", "8",
                "--row", "32k", "--modes", "basic,dualpath,paper/split")  # fmt: skip
    assert found.exit_code == 0, found.output
    rows = {line.split()[0]: line.split() for line in found.output.splitlines() if line.strip()}
    assert rows["basic"][2] == "1.00"
    assert float(rows["dualpath"][2]) >= 1.0 and "paper/split" in rows


def test_run_replays_a_trace(data_trace):
    found = run("--model", "ds-27b", "--prefill-nodes", "1", "--decode-nodes", "1", "--agents", "6",
                "--trace", str(data_trace), "--modes", "basic", "--scheduler", "service")  # fmt: skip
    assert found.exit_code == 0, found.output
    assert "6 agents, 96 turns" in found.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt"], "model 'gpt' is unknown; choose one of ds-660b, ds-27b, qwen-32b"),
        (["--modes", "fast"], "mode 'fast' is unknown; choose one of basic"),
        (["--modes", ","], "modes is empty"),
        (["--modes", "paper/fast"], "path policy 'fast' is unknown; choose one of prefill"),
        (["--modes", "nearest/split"], "placement 'nearest' is unknown; choose one of paper"),
        (["--modes", "affinity/split"], "placement 'affinity' needs engines that keep pages"),
        (["--storage-gbit", "0"], "--storage-gbit is 0.0; give a finite number above 0"),
        (["--compute-gbit", "inf"], "--compute-gbit is inf; give a finite number above 0"),
        (["--row", "8k"], "table 2 row '8k' is unknown; choose one of 32k, 48k, 64k"),
        (["--trace", "/nowhere"], "/nowhere: no such file or directory"),
        (["--scheduler", "none"], "scheduler 'none' is unknown; choose one of policies, service"),
        (["--hbm-gb", "40"], "ds-660b needs 56.9 GB of weights on each of 16 prefill engines"),
        (["--model", "qwen-32b", "--hbm-gb", "80"], "does not fit a decode engine with memory for"),
    ],
)
def test_bad_input_is_refused_with_the_field_the_value_and_the_remedy(arguments, message):
    found = run("--agents", "4", *arguments)
    assert found.exit_code == 2
    assert message in found.output


def test_the_drawn_turns_are_told_beside_table_2(monkeypatch):
    found = {row.name: row for row in absolute.drawn(Bench(Silent()))}
    hits = found["hits of all prompt tokens"]
    assert 0.98 < hits.simulated < 1 and hits.factor == pytest.approx(hits.simulated / 0.987)
    # A mean of turns is less than the mean of sessions' means: long sessions have short turns.
    assert 100 < found["tokens appended in a turn, mean of all turns"].simulated < 429


def test_seconds_stand_beside_the_papers_and_nothing_is_simulated_twice(monkeypatch):
    monkeypatch.setattr("dualpath_sgl.evals.sim.model.workload.TRAJECTORIES", 4)
    monkeypatch.setattr(absolute, "JCT_S", {3: {"basic": 100.0, "dualpath": 50.0}})
    begun = []
    silent = Silent()
    silent.begin = lambda name, turns: begun.append(name)
    bench = Bench(silent)
    rows = absolute.job_completion(bench, (3,))
    assert [row.factor for row in rows] == [rows[0].simulated / 100, rows[1].simulated / 50]
    assert absolute.job_completion(bench, (3,)) == rows and len(begun) == 2


def test_appends_are_swept_at_constant_turns(monkeypatch):
    monkeypatch.setattr("dualpath_sgl.evals.sim.model.workload.TRAJECTORIES", 4)
    rows = absolute.append_sweep(Bench(Silent()), agents=3)
    assert [row.name[-1] for row in rows] == ["5", "1", "2", "4"]
    assert all(row.factor is None and 0.5 < row.simulated < 3 for row in rows)


class Silent:
    def begin(self, name, turns):
        pass

    def made(self, turns):
        pass


def test_every_figure_of_the_paper_gets_a_row_in_the_summary(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "dualpath_sgl.evals.sim.model.workload.TRAJECTORIES", 12
    )  # more would only take longer to draw
    bench, notes = Bench(Silent()), []

    def note(name, value):
        notes.append(name)

    scale, scale_run = paper.scale(bench, TINY, note)
    found = [
        *paper.offline_660b(bench, TINY, note),
        *paper.sweep_27b(bench, TINY, note),
        scale,
        *paper.pairs_27b(bench, TINY, note),
    ]
    assert scale_run.gpus == 96 and scale_run.agents == 24
    path = figures.write(found, tmp_path / "sim-paper")
    assert figures.read(path) == found
    rows = json.loads(path.read_text())
    assert all(set(row) == {"name", "paper", "simulated", "relative_error"} for row in rows)
    by_name = {row["name"]: row for row in rows}
    assert len(by_name) == len(rows) == 13
    assert by_name["offline_speedup_660b"]["paper"] == 1.87
    # Round robin spreads half of the bytes over two links and half over four.
    assert by_name["snic_max_over_mean_round_robin"]["simulated"] == pytest.approx(1.5, rel=0.05)
    assert len(set(notes)) > 10


def test_every_assumption_can_be_turned(monkeypatch):
    monkeypatch.setattr("dualpath_sgl.evals.sim.model.workload.TRAJECTORIES", 3)
    found = variations(Bench(Silent()), agents=3)
    assert len({one.name for one in found}) == len(found) == 11
    as_calibrated, slower_gpu = found[0], found[1]
    assert slower_gpu.name == "prefill_flop_per_s -25%"
    assert slower_gpu[1:] != as_calibrated[1:]
    assert all(0.5 < ratio < 3.0 for one in found for ratio in one[1:])


def test_online_figures_are_the_ratio_of_two_capacities():
    class Rates(Bench):
        """Capacities as if measured: the search itself is tested alone and takes minutes."""

        def capacity(self, model, nodes, mode, precision):
            return {"basic": 0.2, "dualpath": 0.5}[mode]

    size = paper.FULL
    found = {one.name: one.simulated for one in paper.online(Rates(Silent()), size, lambda name, value: None)}
    assert found == {name: pytest.approx(2.5) for name in found} and "online_capacity_mean" in found


def test_a_figure_knows_its_error_and_whether_it_is_met():
    assert Figure.of("speedup", 2.0, 1.81).is_met and not Figure.of("speedup", 2.0, 1.79).is_met
    assert not Figure.of("equal_snic_pair", 1.0, 1.04).is_met
    assert Figure.of("speedup", 2.0, 1.0).relative_error == -0.5
