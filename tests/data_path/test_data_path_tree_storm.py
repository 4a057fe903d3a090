"""Whatever happens, no wrong byte enters a tree, nothing stays pinned and nothing stays open.

`--storm-seeds N` runs N storms a side instead of two; a failure names its seed.
"""

from __future__ import annotations

import pytest
from tree_storm import Storm


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_after_a_storm_bytes_are_right_and_nothing_is_held(engine, role, storm_seed):
    storm = Storm(engine, role, storm_seed)
    storm.run()
    print(storm.summary())
    assert storm.wrong == []
