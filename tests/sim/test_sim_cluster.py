"""The simulated cluster against what can be worked out without it."""

from __future__ import annotations

import pytest
from sim_world import FAST_COMPUTE, MODEL, load, setup, simulate, trajectory

from dualpath_sgl.evals.sim.model import scheduling
from dualpath_sgl.evals.sim.model.cluster import Simulation
from dualpath_sgl.evals.sim.model.hardware import Hardware
from dualpath_sgl.evals.sim.model.models import DS_27B
from dualpath_sgl.evals.sim.model.setup import MODES, Mode, Setup
from dualpath_sgl.evals.sim.model.workload import Lengths, table2_trajectories, workload
from scheduler_svc.policies import path_policies
from scheduler_svc.policies.help_policy import MOST
from scheduler_svc.policies.path_policies import PathChoice

READING_MODES = [name for name, mode in MODES.items() if not mode.oracle]


@pytest.mark.parametrize("scheduler", ["policies", "service"])
@pytest.mark.parametrize("mode", READING_MODES)
def test_every_stored_page_of_every_turn_is_read_exactly_once(mode, scheduler):
    hardware = Hardware(gpus_per_node=2)
    agents = workload(table2_trajectories("32k", 1)[:12], 20, DS_27B, hardware, 1)
    cluster = Setup(DS_27B, hardware, 2, 3, MODES[mode], scheduler)
    simulation, outcome = simulate(cluster, agents)
    assert outcome.store_read_bytes == agents.hit_bytes > 0
    assert outcome.turns == agents.turns
    assert all(link.queued_bytes == 0 for link in simulation.prefill_links + simulation.decode_links)
    for engine in simulation.prefill_engines + simulation.decode_engines:
        assert (engine.tokens, engine.sequences, engine.batch, len(engine.ready)) == (0, 0, 0, 0)


def test_basic_reads_on_prefill_nodes_only_and_oracle_reads_nothing():
    agents = load([trajectory(3)], 4)
    simulation, _ = simulate(setup("basic"), agents)
    assert [link.read_bytes for link in simulation.decode_links] == [0]
    _, oracle = simulate(setup("oracle"), agents)
    assert oracle.store_read_bytes == 0


def test_the_service_closes_every_room_and_counts_the_bytes_that_were_read():
    agents = load([trajectory(5)], 3)
    simulation, outcome = simulate(setup("split", scheduler="service"), agents)
    status = simulation._scheduler.cluster
    assert status.rooms.open_count == 0 and status.rooms.closed_count == agents.turns
    assert status.duplicate_store_pages == 0 and status.errors == 0
    engines = simulation.prefill_engines + simulation.decode_engines
    counted = sum(status.engines.get(engine.engine_id).totals.store_read_bytes for engine in engines)
    assert counted == outcome.store_read_bytes


def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    def jct_s(seed: int) -> float:
        hardware = Hardware()
        agents = workload(table2_trajectories("32k", seed)[:20], 30, DS_27B, hardware, seed)
        return simulate(Setup(DS_27B, hardware, 1, 1, MODES["dualpath"], seed=seed), agents)[1].jct_s

    assert jct_s(1) == jct_s(1)
    assert jct_s(1) != jct_s(2)


def by_hand(hardware: Hardware, lengths: Lengths, *, on_decode: float, layerwise: bool) -> float:
    """The time of a lone turn whose prompt fits one step, every engine stepping alone, with this
    share of the stored pages read by the DE, which keeps them."""
    fixed_s = hardware.layer_step_s * MODEL.layers
    new_tokens = lengths.prompt - lengths.hit
    compute_s = sum(MODEL.prefill_work(new_tokens, lengths.hit)) / hardware.prefill_flop_per_s
    prompt_bytes = lengths.prompt * MODEL.kv_bytes_per_token
    hit_bytes = lengths.hit * MODEL.kv_bytes_per_token
    move_in_s = hit_bytes / hardware.compute_bytes_per_s
    move_out_s = (prompt_bytes - on_decode * hit_bytes) / hardware.compute_bytes_per_s
    step_s = fixed_s + (
        max(compute_s, move_in_s, move_out_s) if layerwise else compute_s + move_in_s + move_out_s
    )
    decode_step_s = fixed_s + MODEL.decode_sequence_s(lengths.prompt, hardware)
    copy_s = prompt_bytes / hardware.compute_bytes_per_s
    read_bytes = max(on_decode, 1 - on_decode) * hit_bytes
    return read_bytes / hardware.storage_bytes_per_s + step_s + copy_s + (lengths.output - 1) * decode_step_s


SLOW = Hardware(gpus_per_node=1, storage_bytes_per_s=1e8, compute_bytes_per_s=4e8, prefill_flop_per_s=1e12)


@pytest.mark.parametrize(
    ("mode", "on_decode"),
    [("basic", 0.0), ("layerwise", 0.0), (Mode("paper", "decode"), 1.0), ("split", 0.5)],
)
def test_a_lone_request_takes_the_time_worked_out_by_hand(mode, on_decode):
    lengths = Lengths(64 * 100 + 40, 64 * 100, 25)
    _, outcome = simulate(setup(mode, SLOW), load([(lengths,)], 1, SLOW))
    expected_s = by_hand(SLOW, lengths, on_decode=on_decode, layerwise=mode != "basic")
    assert outcome.jct_s == pytest.approx(expected_s, rel=1e-9)


def test_a_prompt_above_the_quota_is_computed_in_chunks():
    hardware = SLOW.model_copy(update={"attention_quota_s": 0.01, "compute_bytes_per_s": 1e12})
    lengths = Lengths(3000, 0, 1)
    _, outcome = simulate(setup("layerwise", hardware), load([(lengths,)], 1, hardware))
    compute_s = sum(MODEL.prefill_work(3000, 0)) / hardware.prefill_flop_per_s
    steps = -(-compute_s // 0.01)
    assert steps > 2
    expected_s = compute_s + steps * hardware.layer_step_s * MODEL.layers
    assert outcome.ttft_s == pytest.approx(expected_s, rel=1e-9)


def test_with_storage_as_the_bottleneck_two_links_are_twice_as_fast_as_one():
    agents = load([trajectory(6)], 40)
    basic, split, shorter = (simulate(setup(mode), agents)[1] for mode in ("basic", "split", "dualpath"))
    assert basic.prefill_storage_busy > 0.95
    assert 1.9 < basic.jct_s / split.jct_s <= 2.0
    assert 1.9 < basic.jct_s / shorter.jct_s <= 2.0


def test_with_storage_as_the_bottleneck_only_the_number_of_links_counts():
    agents = load([trajectory(6)], 60)
    two_prefill, two_decode = (
        simulate(setup("dualpath", nodes=nodes), agents)[1] for nodes in ((2, 1), (1, 2))
    )
    assert two_prefill.jct_s == pytest.approx(two_decode.jct_s, rel=0.03)


def test_with_fast_storage_the_paths_are_equally_fast():
    hardware = FAST_COMPUTE.model_copy(update={"storage_bytes_per_s": 1e15})
    agents = load([trajectory(6, output=20)], 10, hardware)
    layerwise, split = (simulate(setup(mode, hardware), agents)[1] for mode in ("layerwise", "split"))
    assert split.jct_s == pytest.approx(layerwise.jct_s, rel=1e-3)


@pytest.mark.parametrize("scheduler", ["policies", "service"])
def test_the_path_is_chosen_by_the_schedulers_own_policy_objects(scheduler, monkeypatch):
    class Third:
        """A path policy that nobody else has."""

        name = "third"
        asked = 0

        def choose(self, request):
            Third.asked += 1
            return PathChoice(request.hit_pages // 3, "a third on the decode side")

    monkeypatch.setitem(path_policies.PATH_POLICIES, "third", Third)
    agents = load([trajectory(4, context_pages=90)], 5)
    simulation, outcome = simulate(setup(Mode("paper", "third"), scheduler=scheduler), agents)
    assert Third.asked == agents.turns
    assert sum(link.read_bytes for link in simulation.decode_links) == outcome.store_read_bytes / 3


@pytest.mark.parametrize("mode", ["layerwise", "dual-path"])
def test_policies_alone_and_the_whole_service_agree_exactly_where_load_does_not_matter(mode):
    agents = load([trajectory(6)], 12)
    alone, service = (
        simulate(setup(mode, nodes=(2, 3), scheduler=scheduler), agents)[1]
        for scheduler in ("policies", "service")
    )
    assert alone == service


@pytest.mark.parametrize("departures_told", [True, False])
def test_heartbeats_at_departures_make_up_for_what_engines_say_once_a_second(departures_told, monkeypatch):
    if not departures_told:
        monkeypatch.setattr(scheduling, "FRESH_S", scheduling.HEARTBEAT_S)
    hardware = Hardware()
    agents = workload(table2_trajectories("32k", 1)[:20], 200, DS_27B, hardware, 1)
    present, told = (
        simulate(Setup(DS_27B, hardware, 1, 2, MODES["dualpath"], scheduler), agents)[1].jct_s
        for scheduler in ("policies", "service")
    )
    assert (told < 1.03 * present) == departures_told


@pytest.mark.parametrize("decode_nodes", [1, 2, 3])
def test_relays_read_a_lone_request_over_every_link_and_the_whole_prompt_is_sent(decode_nodes):
    lengths = Lengths(64 * 120 + 40, 64 * 120, 25)
    simulation, outcome = simulate(setup("relay", SLOW, (1, decode_nodes)), load([(lengths,)], 1, SLOW))
    alone_s = by_hand(SLOW, lengths, on_decode=0.0, layerwise=True)
    hit_bytes = lengths.hit * MODEL.kv_bytes_per_token
    read_s = hit_bytes / SLOW.storage_bytes_per_s
    links = 1 + decode_nodes
    # They meet within a page of each other.
    page_s = 64 * MODEL.kv_bytes_per_token / SLOW.storage_bytes_per_s
    assert outcome.jct_s == pytest.approx(alone_s - read_s + read_s / links, abs=page_s)
    shares = [link.read_bytes / hit_bytes for link in simulation.prefill_links + simulation.decode_links]
    assert shares == pytest.approx([1 / links] * links, abs=0.02)


def test_with_relays_the_number_of_links_counts_for_a_burst_too():
    agents = load([trajectory(6)], 40)
    basic = simulate(setup("layerwise"), agents)[1]
    for decode_nodes in (1, 2):
        relay = simulate(setup("relay", nodes=(1, decode_nodes)), agents)[1]
        assert basic.jct_s / relay.jct_s == pytest.approx(1 + decode_nodes, rel=0.03)


def test_loads_of_two_prefill_nodes_share_the_relays_and_end_together():
    large, small = trajectory(1, context_pages=300), trajectory(1, context_pages=100)
    simulation, outcome = simulate(setup("relay", nodes=(2, 2)), load([large, small], 2))
    link_s = sum(link.read_bytes for link in simulation.prefill_links + simulation.decode_links) / 1e8
    assert outcome.jct_s == pytest.approx(link_s / 4, rel=0.1)


def test_an_engine_loads_one_request_after_another():
    ends = []
    simulation = Simulation(setup("relay"), load([trajectory(1), trajectory(1)], 2))
    simulation.on_turn = lambda turn: ends.append(turn.ttft_s)
    simulation.run_offline()
    assert ends[1] == pytest.approx(2 * ends[0], rel=0.02)


def test_with_many_relays_an_engine_is_helped_by_those_on_its_list():
    simulation, _ = simulate(setup("relay", nodes=(1, 40)), load([trajectory(2)], 1))
    helped = sum(1 for link in simulation.decode_links if link.read_bytes)
    assert helped == MOST
