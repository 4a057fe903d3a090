from __future__ import annotations

from pathlib import Path

import pytest

from dualpath_sgl.evals import agents


@pytest.fixture
def data_trace() -> Path:
    """The sessions that come with the project."""
    return Path(agents.__file__).parent / "data" / "claude-code-weka"
