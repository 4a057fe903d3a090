"""What the load benchmark measures: enough for every figure, and each cell where it can be measured."""

from collections import Counter

import pytest

from dualpath_sgl.evals.load.outcome.cells import Cell, FaultSeen, Sample
from dualpath_sgl.evals.load.outcome.figures import TARGETS, Found, figures
from dualpath_sgl.evals.load.plan import (
    ONE_ONE,
    ONE_TWO,
    TWO_ONE,
    TWO_TWO,
    CellPlan,
    Fault,
    make_plan,
)
from dualpath_sgl.launch.config.cluster import Mode

PLAN = make_plan(repetitions=3, quick=False)


def measured(plan: CellPlan) -> Cell:
    count = len(plan.places)
    sample = Sample(
        job_s=10.0,
        ttft_s=[2.0 if plan.flushed else 1.0] * count,
        e2e_s=[3.0] * count,
        storage_bytes={"prefill-0": 1000},
        storage_utilisation=None,
        store_sent_bytes=1000,
        cpu_s={},
        cached_tokens=0,
        tokens_equal=True,
        fault=FaultSeen(after_s=1.0, received_bytes=10, rest_bits_per_s=1e6) if plan.fault else None,
    )
    return Cell(
        topology=plan.topology.name,
        mode=plan.mode,
        load=plan.load,
        requests=count,
        storage_bits_per_s=None,
        samples=[sample],
    )


def test_every_figure_has_its_cells_in_the_plan():
    cells = {cell.name: measured(cell) for cluster in PLAN.all_clusters for cell in cluster.cells}
    found = figures(Found(cells, None, page_bytes=1 << 20))
    missing = {name for name, figure in found.items() if figure.value is None}
    assert missing == {"forward_goodput_ratio"}
    assert any(cluster.forwards for cluster in PLAN.clusters)
    assert set(found) == set(TARGETS)


@pytest.mark.parametrize("quick", [False, True])
def test_a_cell_is_measured_once_on_a_cluster_that_has_its_engines(quick):
    plan = make_plan(repetitions=2, quick=quick)
    names = Counter(cell.name for cluster in plan.all_clusters for cell in cluster.cells)
    assert set(names.values()) == {1}
    for cluster in plan.all_clusters:
        for cell in cluster.cells:
            for place in cell.places:
                assert place.prefill < cluster.topology.prefill
                assert place.decode < cluster.topology.decode
            assert cell.topology.decode <= cluster.topology.decode
            assert (cell.mode == "relay" or cell.fault is Fault.KILLED) <= (cluster.mode is Mode.RELAY)


def test_relays_only_die_so_none_is_started_again_for_a_smaller_topology():
    relay = next(cluster for cluster in PLAN.clusters if cluster.mode is Mode.RELAY)
    counts = [cell.relays for cell in relay.cells]
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("topology", [ONE_ONE, ONE_TWO, TWO_ONE, TWO_TWO])
def test_equal_loads_take_turns_over_all_engines(topology):
    places = CellPlan(topology, "basic", "burst", 1).places
    for engines, chosen in (
        (topology.prefill, Counter(place.prefill for place in places)),
        (topology.decode, Counter(place.decode for place in places)),
    ):
        assert len(chosen) == engines and max(chosen.values()) - min(chosen.values()) <= 0


def test_the_first_prefill_engine_has_three_quarters_of_an_uneven_load_and_decode_engines_have_halves():
    places = CellPlan(TWO_TWO, "basic", "3to1", 1).places
    assert Counter(place.prefill for place in places) == {0: 6, 1: 2}
    assert Counter(place.decode for place in places) == {0: 4, 1: 4}
    alone = CellPlan(TWO_TWO, "relay", "alone", 1).places
    assert Counter(place.prefill for place in alone) == {1: 2}
