"""The wheel and the sdist, and environments that hold the installed copy and nothing of the source tree."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from installed_copy import Environment, build, copy_of_tree


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a fresh clone has: no leftovers of an earlier build get into the wheel."""
    return copy_of_tree(tmp_path_factory.mktemp("tree") / "project")


@pytest.fixture(scope="session")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", tree, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="session")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The wheel and what it declares to need: no SGLang, no torch."""
    environment = Environment.create(tmp_path_factory.mktemp("bare"), wheel)
    environment.link_declared()
    return environment


@pytest.fixture(scope="session")
def complete(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The wheel in the CPU profile."""
    environment = Environment.create(tmp_path_factory.mktemp("complete"), wheel)
    environment.see_everything()
    return environment
