"""Synthetic sessions have the statistics they claim."""

from itertools import pairwise
from statistics import fmean

import pytest

from dualpath_sgl.evals.agents.table2 import ROWS, trajectories
from dualpath_sgl.evals.agents.trace import sharings


@pytest.mark.parametrize("name", ROWS)
def test_means_of_synthetic_sessions_are_those_of_the_papers_table(name):
    row = ROWS[name]
    sessions = trajectories(row, 500, seed=1)

    def appends(requests):
        pairs = pairwise(requests)
        return fmean(
            after.prompt_tokens - before.prompt_tokens - before.output_tokens for before, after in pairs
        )

    last = [session.requests[-1] for session in sessions]
    measured = {
        "turns": fmean(len(session.requests) for session in sessions),
        "append": fmean(appends(session.requests) for session in sessions if len(session.requests) > 1),
        "generation": fmean(fmean(r.output_tokens for r in session.requests) for session in sessions),
        "total": fmean(request.prompt_tokens + request.output_tokens for request in last),
        "context": fmean(fmean(r.prompt_tokens for r in session.requests) for session in sessions),
    }
    for statistic, value in measured.items():
        assert value == pytest.approx(getattr(row, statistic), rel=0.1), statistic


def test_synthetic_sessions_are_seeded_fit_their_length_and_only_append():
    row = ROWS["32k"]
    sessions = trajectories(row, 20, seed=5)
    assert sessions == trajectories(row, 20, seed=5) != trajectories(row, 20, seed=6)
    for session in sessions:
        assert all(r.prompt_tokens + r.output_tokens <= row.max_len for r in session.requests)
        assert all(shared.extends for shared in sharings(session)[1:])
