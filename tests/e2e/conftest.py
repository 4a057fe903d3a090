"""Real clusters, one at a time: real SGLang engines, store, router and scheduler.

Starting one is most of the time, so modules with the same cluster share it; their names sort
together.  After every module its cluster must hold nothing that belongs to a request.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from grammars import ask_all

from dualpath_sgl.evals.agents.sessions import TURNS, Session, assert_nothing_is_held, update_weights
from dualpath_sgl.launch.config.cluster import ClusterConfig, Mode, load
from dualpath_sgl.launch.supervision.cluster import Cluster
from dualpath_sgl.launch.supervision.single_server import SingleServer

CLUSTERS = Path(__file__).parent / "clusters"
SESSIONS = ("ada", "bob", "eve")


class OneCluster:
    """The cluster that runs now; another one starts only after it has stopped.

    SGLang wants 10 GiB to stay free beside its host pools, so two clusters at once would ask for
    more than a small machine has.
    """

    def __init__(self, run_dirs: pytest.TempPathFactory) -> None:
        self._run_dirs = run_dirs
        self.running: Cluster | None = None
        self._started_as: ClusterConfig | None = None

    def get(self, config: ClusterConfig) -> Cluster:
        """The running cluster if `config` started it, else a fresh one."""
        if self.running is None or self._started_as != config:
            self.stop()
            fresh = Cluster(config, self._run_dirs.mktemp(config.name))
            fresh.start()
            self.running, self._started_as = fresh, config
        return self.running

    def single_server(self, config: ClusterConfig) -> SingleServer:
        """One plain SGLang server of the cluster's model, to be entered; it knows the right answers."""
        self.stop()
        return SingleServer(config, self._run_dirs.mktemp("single"))

    def stop(self) -> None:
        if self.running is not None:
            self.running.stop()
            self.running = None


@pytest.fixture(scope="session")
def one_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneCluster]:
    clusters = OneCluster(tmp_path_factory)
    yield clusters
    clusters.stop()


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left_behind(one_cluster: OneCluster) -> Iterator[None]:
    yield
    if one_cluster.running is not None and one_cluster.running.config.mode is Mode.DECODE_SIDE:
        assert_nothing_is_held(one_cluster.running)


@pytest.fixture(scope="session")
def config() -> ClusterConfig:
    return load(CLUSTERS / "gqa-1p1d.yaml")


Answers = dict[str, list[list[int]]]
"""Session name -> generated token ids of each turn."""


@dataclass(frozen=True)
class RightAnswers:
    """What one plain SGLang server answers."""

    sessions: Answers
    grammars: dict[str, str]
    other_sessions: Answers
    """The same sessions, after an update to the other weights."""


@pytest.fixture(scope="session")
def other_weights(config: ClusterConfig) -> Path:
    """A model that differs from the cluster's in its weights only."""
    return config.model.model_copy(update={"seed": config.model.seed + 1}).directory()


@pytest.fixture(scope="session")
def right_answers(config: ClusterConfig, other_weights: Path, one_cluster: OneCluster) -> RightAnswers:
    with one_cluster.single_server(config) as server:
        sessions, grammars = _answers(server.url), ask_all(server.url)
        update_weights(server.url, other_weights)
        return RightAnswers(sessions, grammars, _answers(server.url))


def _answers(url: str) -> Answers:
    sessions = [Session(name) for name in SESSIONS]
    for session in sessions:
        for turn in range(TURNS):
            session.play(url, turn)
    return {session.name: session.answers for session in sessions}


@pytest.fixture(scope="session")
def reference(right_answers: RightAnswers) -> Answers:
    """The single server's answers with the cluster's own weights."""
    return right_answers.sessions


@pytest.fixture(scope="session")
def grammar_reference(right_answers: RightAnswers) -> dict[str, str]:
    return right_answers.grammars


@pytest.fixture(scope="module")
def cluster(config: ClusterConfig, reference: dict, one_cluster: OneCluster) -> Cluster:
    return one_cluster.get(config)


@pytest.fixture
def sessions() -> list[Session]:
    return [Session(name) for name in SESSIONS]
