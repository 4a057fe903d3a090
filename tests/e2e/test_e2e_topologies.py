"""Two engines of each role, an MLA model, pages of 64 tokens, and pools smaller than the work."""

from __future__ import annotations

import re
import urllib.error

import pytest
from conftest import CLUSTERS

from dualpath_sgl.evals.agents.sessions import (
    Session,
    forget_caches,
    generate,
    play_all,
    reads,
    reads_of,
    settled_status,
    wait_until_served,
)
from dualpath_sgl.launch.config.cluster import load

TURNS = 2
CROWD = ("ada", "bob", "eve", "mia", "kim", "lee", "sam", "tom", "una", "zoe")
"""Every one of them brings 12 pages: five per engine, for 32 pages of device and 48 of host pool."""
GIANTS = ("goliath", "orion", "titan")
GIANT_PROMPT_TOKENS = 1800
"""29 pages: one all but fills an engine's device pool; two do not fit into its host pool."""
TOO_LARGE_PROMPT_TOKENS = 4000
NEWCOMERS = ("ian", "joe")
"""Nothing of them is stored before the test that needs prompts to compute: eleven pages each."""


@pytest.fixture(scope="module")
def mla_config():
    return load(CLUSTERS / "mla-2p2d.yaml")


@pytest.fixture(scope="module")
def mla_reference(mla_config, one_cluster) -> dict[str, list[list[int]]]:
    """Answers of one plain SGLang server of the MLA model, one list for each turn."""
    some, others, large = people(), crowd()[len(people()) :] + newcomers(), giants()
    with one_cluster.single_server(mla_config) as server:
        for turn in range(TURNS):
            for session in some:
                session.play(server.url, turn)
        for session in others + large:
            session.play(server.url, 0)
    return {session.name: session.answers for session in some + others + large}


@pytest.fixture(scope="module")
def cluster(mla_config, mla_reference, one_cluster):
    return one_cluster.get(mla_config)


def people() -> list[Session]:
    return [Session(name) for name in CROWD[:4]]


def crowd() -> list[Session]:
    return [Session(name) for name in CROWD]


def newcomers() -> list[Session]:
    return [Session(name) for name in NEWCOMERS]


def giants() -> list[Session]:
    return [Session(name, GIANT_PROMPT_TOKENS) for name in GIANTS]


def play_from_store(cluster, sessions: list[Session], turn: int) -> None:
    forget_caches(cluster)
    play_all(cluster.url, sessions, turn)


def assert_right(sessions: list[Session], reference: dict[str, list[list[int]]]) -> None:
    wrong = [
        session.name
        for session in sessions
        if session.answers != reference[session.name][: len(session.answers)]
    ]
    assert not wrong, f"not the single server's tokens: {wrong}"


@pytest.mark.parametrize("policy", ["prefill", "decode", "round_robin", "split"])
def test_every_path_between_two_prefill_and_two_decode_engines_gives_the_single_servers_tokens(
    cluster, mla_reference, policy
):
    cluster.set_policy(policy)
    sessions = people()
    for turn in range(TURNS):
        play_from_store(cluster, sessions, turn)
    assert_right(sessions, mla_reference)
    counted = reads(cluster)
    assert (counted.prefill_store_bytes > 0) is (policy != "decode")
    assert (counted.decode_store_bytes > 0) is (policy != "prefill")
    assert (counted.forwarded_bytes > 0) is (policy != "prefill")
    assert counted.forwarded_bytes == counted.decode_store_bytes
    assert counted.duplicate_store_pages == 0
    assert counted.fallbacks == 0


@pytest.mark.parametrize("policy", ["decode", "split"])
def test_requests_that_together_exceed_every_host_pool_are_all_answered(cluster, mla_reference, policy):
    cluster.set_policy(policy)
    sessions = crowd()
    for _ in range(2):  # once to have every page in the store, once to load all of them at once
        play_from_store(cluster, sessions, 0)
        assert_right(sessions, mla_reference)
    counted = reads(cluster)
    assert counted.forwarded_bytes > 0
    assert counted.duplicate_store_pages == 0


@pytest.mark.parametrize("policy", ["decode", "split"])
def test_requests_that_each_fill_a_whole_pool_are_all_answered(cluster, mla_reference, policy):
    cluster.set_policy(policy)
    sessions = giants()
    for _ in range(2):
        play_from_store(cluster, sessions, 0)
        assert_right(sessions, mla_reference)
    assert reads(cluster).duplicate_store_pages == 0


def test_a_request_larger_than_every_pool_gets_an_http_error_and_disturbs_nobody(cluster, mla_reference):
    cluster.set_policy("split")
    with pytest.raises(urllib.error.HTTPError):
        generate(cluster.url, Session("leviathan", TOO_LARGE_PROMPT_TOKENS).prompt(0))
    sessions = people()
    play_from_store(cluster, sessions, 0)
    assert_right(sessions, mla_reference)


@pytest.mark.slow
def test_prompts_cut_by_the_attention_quota_get_the_single_servers_tokens(cluster, mla_reference):
    bounded = cluster.processes["prefill-0"]
    bounded.argv = [*bounded.argv, "--chunked-prefill-size=1024"]
    bounded.env["DUALPATH_ATTENTION_QUOTA_MS"] = "0.0001"
    known = len(bounded.log_path.read_text())
    cluster.restart("prefill-0")
    wait_until_served(cluster)
    cluster.set_policy("split")
    sessions = newcomers() + people()  # the router takes turns: one newcomer each
    for session in sessions:
        session.play(cluster.url, 0)
    assert_right(sessions, mla_reference)
    steps = re.findall(r"Prefill batch.*#new-token: (\d+)", bounded.log_path.read_text()[known:])
    assert max(map(int, steps)) == cluster.config.page_size
    assert len(steps) > 10


@pytest.mark.slow
def test_nothing_is_forwarded_between_engines_whose_layouts_differ_and_the_scheduler_says_so(
    cluster, mla_reference
):
    # The last test of its cluster: decode-1 comes back with another model name in its fingerprint.
    other = cluster.processes["decode-1"]
    other.argv = [*other.argv, "--served-model-name=another"]
    cluster.restart("decode-1")
    wait_until_served(cluster)
    cluster.set_policy("decode")
    sessions = people()
    for turn in range(TURNS):
        play_from_store(cluster, sessions, turn)
    assert_right(sessions, mla_reference)
    status = settled_status(cluster)
    assert set(status.fallbacks) == {"fingerprint_differs"}
    read = {engine.engine.engine_id: engine.store_read_bytes for engine in status.engines}
    assert read["decode-0"] > 0, "the pair with equal layouts forwards as before"
    assert read["decode-1"] == 0
    assert read["prefill-0"] + read["prefill-1"] > 0
    assert reads_of(status).forwarded_bytes == read["decode-0"]
