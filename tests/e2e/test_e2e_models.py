"""Kinds of KV that a decode engine's tree does not hold reach a prefill engine through a relay: two of the proofs.

`make test-models` runs all of them.
"""

from __future__ import annotations

import pytest

from dualpath_sgl.evals.models import on_cpu
from dualpath_sgl.evals.models.cases import Case, described, single
from dualpath_sgl.evals.models.proof import answers_of_one, compare
from dualpath_sgl.launch.config.cluster import Mode

PROOFS = {case.name: case for case in on_cpu.CASES}


@pytest.mark.parametrize(
    "case",
    [pytest.param(PROOFS[name], id=name, marks=pytest.mark.slow) for name in ("swa", "gdn")],
)
def test_windows_and_states_come_through_a_relay_and_the_tokens_are_those_of_one_server(
    case: Case, one_cluster, capsys
):
    config = described(case, "cpu", Mode.RELAY)
    with one_cluster.single_server(single(case, config)) as server:
        reference = answers_of_one(case, server.url)
    record = compare(case, one_cluster.get(config), reference, print)
    assert record.tokens_equal, capsys.readouterr().out
    assert record.relay_bytes > 0
    assert record.fallbacks == 0
