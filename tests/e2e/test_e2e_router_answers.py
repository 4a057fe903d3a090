"""Every kind of request, through the placing router and from a single server: the same is told."""

from __future__ import annotations

import pytest

from dualpath_sgl.evals.agents.sessions import generate
from dualpath_sgl.evals.clients import cases
from dualpath_sgl.evals.clients.routers import placing_router
from dualpath_sgl.evals.clients.told import Told, ask, differences, problem_told

pytestmark = pytest.mark.slow
CASES = [*cases.generating(), *cases.others()]


@pytest.fixture(scope="module")
def right(config, one_cluster) -> dict[str, Told]:
    with one_cluster.single_server(config) as server:
        return {case.name: ask(server.url, case) for case in CASES}


@pytest.fixture(scope="module")
def placing(config, right, one_cluster):
    cluster = one_cluster.get(config)
    cluster.set_policy("split")
    with placing_router(cluster) as url:
        yield url


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_placing_router_tells_what_a_single_server_tells(right, placing, case):
    told = ask(placing, case)
    if problem_told(right[case.name]) is not None:
        assert problem_told(told) is not None, told
        return
    assert told.status == right[case.name].status, told
    assert not list(differences(right[case.name].what, told.what))


@pytest.mark.parametrize("case", cases.ending(), ids=[case.name for case in cases.ending()])
def test_what_would_end_an_engine_is_refused_and_the_cluster_lives(placing, case):
    assert ask(placing, case).status == 400
    assert generate(placing, [1, 2, 3, 4])
