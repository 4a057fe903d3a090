from __future__ import annotations

from pathlib import Path

import pytest

import evals


@pytest.fixture
def data_trace() -> Path:
    """The sessions that come with the project."""
    return Path(evals.__file__).parent / "data" / "claude-code-weka"
