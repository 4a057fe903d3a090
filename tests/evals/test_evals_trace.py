"""Loading traces: the shipped subset, and what is said about files that are no traces."""

import json
from pathlib import Path

import pytest

from dualpath_sgl.evals.agents.subset import write_subset
from dualpath_sgl.evals.agents.trace import (
    Sharing,
    load_session,
    load_sessions,
    sharings,
    theoretical_hit_rate,
)
from dualpath_sgl.evals.agents.workload import build
from dualpath_sgl.evals.common.errors import EvalError

SHIPPED = Path(__file__).parents[2] / "evals" / "agents" / "data" / "claude-code-weka"


def session_file(folder: Path, **changes) -> Path:
    document = {
        "id": "s",
        "block_size": 4,
        "requests": [
            {"in": 9, "out": 3, "hash_ids": [1, 2]},
            {"in": 17, "out": 2, "hash_ids": [1, 2, 3, 4]},
            {"in": 12, "out": 1, "hash_ids": [1, 9, 10]},
        ],
    }
    file = folder / "s.json"
    file.write_text(json.dumps(document | changes))
    return file


def test_the_shipped_subset_loads_and_is_small_and_licensed():
    sessions = load_sessions(SHIPPED)
    assert len(sessions) >= 4
    assert sum(len(session.requests) for session in sessions) >= 60
    assert sum(file.stat().st_size for file in SHIPPED.glob("*.json")) < 400_000
    assert "Apache License" in (SHIPPED / "LICENSE").read_text()
    assert "kv-cache-tester" in (SHIPPED / "NOTICE").read_text()


def test_the_shipped_subset_has_appends_and_left_contexts():
    kinds = {
        shared.extends
        for session in load_sessions(SHIPPED)
        for shared in sharings(session)
        if shared is not None
    }
    assert kinds == {True, False}


def test_a_subset_of_the_shipped_subset_is_a_valid_trace_with_the_same_beginning(tmp_path):
    source = SHIPPED / "trace_0228.json"
    (written,) = write_subset([source], tmp_path, requests=3)
    assert load_session(written).requests == load_session(source).requests[:3]


def test_sharing_names_the_earlier_request_with_the_longest_common_prefix(tmp_path):
    session = load_session(session_file(tmp_path))
    assert sharings(session) == [None, Sharing(0, 2, True), Sharing(1, 1, False)]


def test_the_theoretical_hit_rate_of_a_trace_counts_shared_whole_blocks(tmp_path):
    session = load_session(session_file(tmp_path))
    assert theoretical_hit_rate([session]) == (0 + 2 * 4 + 1 * 4) / (9 + 17 + 12)


def test_requests_of_a_sub_agent_take_its_place_in_the_order(tmp_path):
    nested = {"type": "subagent", "requests": [{"in": 5, "out": 1, "hash_ids": [7]}]}
    requests = [{"in": 4, "out": 1, "hash_ids": [1]}, nested, {"in": 8, "out": 1, "hash_ids": [1, 2]}]
    session = load_session(session_file(tmp_path, requests=requests))
    assert [request.prompt_tokens for request in session.requests] == [4, 5, 8]
    assert sharings(session)[2] == Sharing(0, 1, True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"block_size": 0}, "field block_size: Input should be greater than or equal to 1, got '0'"),
        ({"block_size": "64"}, "field block_size"),
        ({"requests": []}, "field requests"),
        ({"requests": [{"in": 9, "out": 1}]}, "field requests.0.hash_ids is missing"),
        ({"requests": [{"in": -9, "out": 1, "hash_ids": []}]}, "field requests.0.in"),
        ({"requests": [{"in": 9, "out": None, "hash_ids": [1, 2]}]}, "field requests.0.out"),
        ({"requests": [{"in": 9, "out": 1, "hash_ids": [1, "x"]}]}, "field requests.0.hash_ids.1"),
        ({"requests": [{"in": 9, "out": 1, "hash_ids": [1]}]}, "requests.0.hash_ids has 1 ids, but in=9"),
        ({"requests": ["hello"]}, "field requests.0"),
        ({"requests": [{"type": "subagent"}]}, "field requests.0"),
    ],
)
def test_a_bad_trace_is_refused_with_file_field_value_and_remedy(tmp_path, changes, said):
    file = session_file(tmp_path, **changes)
    with pytest.raises(EvalError) as caught:
        load_session(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ") and said in message and "leave" in message


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"", b"[1, 2]", b"7"])
def test_a_file_that_is_no_session_is_refused(tmp_path, content):
    file = tmp_path / "x.json"
    file.write_bytes(content)
    with pytest.raises(EvalError, match="expected"):
        load_session(file)


def test_a_missing_path_and_an_empty_folder_are_refused(tmp_path):
    with pytest.raises(EvalError, match="no such file"):
        load_sessions(tmp_path / "absent")
    with pytest.raises(EvalError, match="holds no .json"):
        load_sessions(tmp_path)


def test_think_times_are_read_where_there_are_some_and_never_run_backwards(tmp_path):
    requests = [{"in": 70, "out": 4, "hash_ids": [1]} | extra for extra in ({}, {"think_time": None})]
    requests += [{"in": 70, "out": 4, "hash_ids": [1], "think_time": think} for think in (3, 2.5, -1.0)]
    file = tmp_path / "s.json"
    file.write_text(json.dumps({"id": "s", "block_size": 64, "requests": requests}))
    session = load_session(file)
    assert [request.think_s for request in session.requests] == [None, None, 3, 2.5, -1]
    workload = build([session], agents=1, turns=None, max_context_tokens=100, page_size=16)
    assert [turn.think_s for turn in workload.sessions[0].turns] == [0, 0, 3, 2.5, 0]
    requests[0]["think_time"] = "long"
    file.write_text(json.dumps({"id": "s", "block_size": 64, "requests": requests}))
    with pytest.raises(EvalError, match="field requests.0.think_time"):
        load_session(file)
