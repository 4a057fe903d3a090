"""Engines over SGLang's real tree (tree_story.py)."""

import pytest


@pytest.fixture
def engine(own_process):
    """Builds the test's one engine, in a process of the test's own: `engine("decode", policy="timeout")`."""
    from tree_story import Engine

    return Engine
