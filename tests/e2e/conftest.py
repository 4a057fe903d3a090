"""One real cluster per module: real SGLang engines, store, router and scheduler."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agents import TURNS, Session  # noqa: E402

from launch.config import ClusterConfig, load  # noqa: E402
from launch.supervisor import Cluster, single_server  # noqa: E402

CONFIG = Path(__file__).parents[2] / "launch" / "clusters" / "cpu-1p1d.yaml"
SESSIONS = ("ada", "bob", "eve")


@pytest.fixture(scope="session")
def config() -> ClusterConfig:
    return load(CONFIG)


@pytest.fixture(scope="session")
def reference(config: ClusterConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[int]]]:
    """Answers of one plain SGLang server: session name -> generated token ids of each turn."""
    with single_server(config, tmp_path_factory.mktemp("single")) as server:
        sessions = [Session(name) for name in SESSIONS]
        for session in sessions:
            for turn in range(TURNS):
                session.play(server.url, turn)
    return {session.name: session.answers for session in sessions}


@pytest.fixture(scope="module")
def cluster(
    config: ClusterConfig, reference: dict, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    # Per module, and after the reference: SGLang wants 10 GiB to stay free beside its host pools, so
    # two clusters at once would ask for more than a small machine has.
    with Cluster(config, tmp_path_factory.mktemp("dualpath")) as running:
        yield running


@pytest.fixture
def sessions() -> list[Session]:
    return [Session(name) for name in SESSIONS]
