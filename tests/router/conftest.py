"""One scheduler, one router and four engines for all router tests of a module."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "scheduler"))

from router_world import World


@pytest.fixture(scope="session")
def shared_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World(tmp_path_factory.mktemp("router")) as world:
        yield world


@pytest.fixture
def world(shared_world: World) -> World:
    """Everything works again, whatever the test before has broken."""
    shared_world.mend()
    return shared_world
