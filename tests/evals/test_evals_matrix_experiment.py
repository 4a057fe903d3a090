"""What an experiment file may say, what it means, and how a wrong one is told."""

from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.matrix.cells import cells, counts, fingerprint
from dualpath_sgl.evals.matrix.experiment import EXPERIMENTS, load_experiment, variants
from dualpath_sgl.evals.matrix.modes import cluster_of
from dualpath_sgl.evals.matrix.workloads import pace, play, poisson
from dualpath_sgl.launch.config import CLUSTERS
from dualpath_sgl.launch.config.cluster import Mode, load

CLUSTER = load(CLUSTERS / "demo.yaml")
OFFLINE = {"kind": "offline", "agents": 3, "concurrency": 2}
ONLINE = {"kind": "online", "agents": 5, "agents_per_s": 0.5, "think": 1}
CAPACITY = {"kind": "capacity", "agents": 9, "first_agents_per_s": 0.2}
MINIMAL = {
    "name": "small",
    "cluster": "demo.yaml",
    "modes": ["basic", "split"],
    "traces": {"coding": {"turns": 2, "max_context": 512}},
    "loads": [OFFLINE],
}


def written(folder: Path, **changes) -> Path:
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(MINIMAL | changes))
    return file


def test_every_shipped_experiment_can_be_read_and_means_cells():
    files = sorted(EXPERIMENTS.glob("*.yaml"))
    assert files
    for file in files:
        experiment = load_experiment(file)
        assert len({cell.name for cell in cells(experiment)}) == len(list(cells(experiment)))


def test_cells_of_one_cluster_follow_each_other_and_share_their_tokens_with_other_modes(tmp_path):
    experiment = load_experiment(
        written(tmp_path, topologies=["1p1d", "1p2d"], loads=[OFFLINE, ONLINE], repetitions=2)
    )
    found = list(cells(experiment))
    assert len(found) == 2 * 2 * 2 * 2
    clusters = [(cell.topology, cell.mode) for cell in found]
    assert clusters == sorted(clusters, key=list(dict.fromkeys(clusters)).index)
    assert [counts(cell) for cell in found[::8]] == [(1, 1), (1, 2)]
    by_traffic: dict[str, set[int]] = {}
    for cell in found:
        by_traffic.setdefault(cell.traffic_name, set()).add(cell.seed(experiment))
    assert len(by_traffic) == 4 and all(len(seeds) == 1 for seeds in by_traffic.values())
    assert len(set.union(*by_traffic.values())) == 4


def test_a_cells_fingerprint_changes_with_all_that_it_depends_on_and_with_nothing_else(tmp_path):
    def prints(cluster=CLUSTER, url=None, **changes):
        experiment = load_experiment(written(tmp_path, **changes))
        return {cell.name: fingerprint(cell, experiment, cluster, url) for cell in cells(experiment)}

    before = prints()
    assert prints(about="another sentence", modes=["basic", "split", "both"]).items() >= before.items()
    for changed in (
        prints(seed=2),
        prints(traces={"coding": {"turns": 1, "max_context": 512}}),
        prints(url="http://127.0.0.1:1"),
        prints(cluster=CLUSTER.model_copy(update={"page_size": 32})),
    ):
        assert not changed.items() & before.items()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"modes": ["basic", "quick"]}, ["modes", "quick", "shorter_queue"]),
        ({"modes": ["basic", "basic"]}, ["modes", "basic", "twice"]),
        ({"modes": []}, ["modes"]),
        ({"topologies": ["1p"]}, ["topologies", "1p", "1p2d"]),
        ({"topologies": ["0p1d"]}, ["topologies", "0p1d"]),
        ({"cluster": "no-such.yaml"}, ["cluster", "no-such.yaml"]),
        ({"loads": [OFFLINE | {"concurrency": 0}]}, ["loads.0", "concurrency", "0"]),
        ({"loads": [OFFLINE, OFFLINE]}, ["twice", "3-agents"]),
        ({"loads": [{"agents": 3}]}, ["loads.0", "kind"]),
        ({"loads": [ONLINE | {"agents_per_s": -1}]}, ["agents_per_s", "-1"]),
        ({"traces": {"coding": {"format": "lmcache-agent"}}}, ["traces.coding", "path is missing"]),
        ({"traces": {"coding": {"format": "mooncake-fast25"}}}, ["traces.coding", "path is missing"]),
        ({"traces": {"coding": {"format": "table2", "path": "x"}}}, ["traces.coding", "table2 is drawn"]),
        ({"traces": {"coding": {"append": [0]}}}, ["traces.coding.append.0", "0"]),
        ({"traces": {"Coding Agent": {}}}, ["traces", "Coding Agent"]),
        ({"name": "No Name"}, ["name", "No Name"]),
        ({"no_such_field": 1}, ["no_such_field"]),
        ({"service_level": {"ttft_s": 0}}, ["service_level.ttft_s", "0"]),
    ],
    ids=str,
)
def test_a_wrong_experiment_is_told_with_file_field_and_value(tmp_path, changes, told):
    file = written(tmp_path, **changes)
    with pytest.raises(EvalError) as caught:
        load_experiment(file)
    message = str(caught.value)
    assert str(file) in message and "\n" not in message
    assert [part for part in told if part not in message] == []


def test_a_file_that_is_missing_or_no_mapping_is_told_with_a_remedy(tmp_path):
    with pytest.raises(EvalError, match="cpu-report.yaml"):
        load_experiment(tmp_path / "none.yaml")
    for text, told in (("[1]", "mapping"), ("a: [", "line 1")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(EvalError, match=told):
            load_experiment(tmp_path / "bad.yaml")


def test_a_sweep_is_one_variant_for_each_step_and_only_what_it_names_changes(tmp_path):
    sweep = {"coding": {"turns": 4, "max_context": 512, "append": [0.5, 2], "generation": [1, 4]}}
    found = list(variants(load_experiment(written(tmp_path, traces=sweep))))
    assert [variant.name for variant in found] == [
        "coding-append-0.5-generation-1",
        "coding-append-0.5-generation-4",
        "coding-append-2-generation-1",
        "coding-append-2-generation-4",
    ]

    def share_generated(variant):
        turns = [t for s in play(variant, 3, CLUSTER, 1).workload.sessions for t in s.turns]
        appended = [turn.new_tokens for turn in turns if turn.parent is not None]
        return sum(appended), sum(turn.output_tokens for turn in turns)

    short, talkative, long, _ = (share_generated(variant) for variant in found)
    # The longest session is scaled to fit, so that it is shares that change.
    assert long[0] / long[1] > short[0] / short[1] > talkative[0] / talkative[1]


def test_the_oracles_prefill_pool_holds_all_contexts_and_other_modes_keep_theirs():
    oracle = cluster_of(CLUSTER, "oracle", 1, 2, context_tokens=50_000)
    assert oracle.mode is Mode.BASIC and oracle.prefill.max_total_tokens >= 50_000
    assert oracle.decode.count == 2
    basic = cluster_of(CLUSTER, "basic", 2, 1, context_tokens=50_000)
    assert (basic.prefill.max_total_tokens, basic.prefill.count) == (CLUSTER.prefill.max_total_tokens, 2)
    assert cluster_of(CLUSTER, "prefill", 1, 1, 0).scheduler.policy == "prefill"
    assert cluster_of(CLUSTER, "default", 1, 1, 0) == CLUSTER


def test_agents_come_at_random_at_the_given_rate_and_the_same_seed_repeats_them():
    starts_s = poisson(4000, 2.0, seed=3)
    assert starts_s == sorted(starts_s) == poisson(4000, 2.0, seed=3) != poisson(4000, 2.0, seed=4)
    gaps_s = [after - before for before, after in pairwise(starts_s)]
    mean_s = sum(gaps_s) / len(gaps_s)
    assert mean_s == pytest.approx(0.5, rel=0.1)
    # Exponential: the standard deviation is the mean.
    assert (sum((gap - mean_s) ** 2 for gap in gaps_s) / len(gaps_s)) ** 0.5 == pytest.approx(mean_s, rel=0.1)


def test_loads_say_when_requests_are_sent(tmp_path):
    experiment = load_experiment(written(tmp_path, loads=[OFFLINE, ONLINE, CAPACITY]))
    offline, online, capacity = experiment.loads
    assert pace(offline, 3, 1)[:3] == (2, None, 0)
    assert pace(online, 5, 1).concurrency is None and len(pace(online, 5, 1).starts_s) == 5
    assert pace(online, 5, 1).think_s(7) == 7 and pace(online, 5, 1).think_s(1e6) == 60
    assert pace(offline, 3, 1).think_s(7) == 0
    assert pace(capacity, 9, 1, agents_per_s=4.0).starts_s == poisson(9, 4.0, 1)
