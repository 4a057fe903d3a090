"""Traces as lines: LMCache's full text, Mooncake's FAST25, and what agents make of them."""

import json
from pathlib import Path

import pytest

from dualpath_sgl.evals.agents import chat
from dualpath_sgl.evals.agents.lmcache import load_text_sessions
from dualpath_sgl.evals.agents.mooncake import load_mooncake
from dualpath_sgl.evals.agents.talk import ChatTalk
from dualpath_sgl.evals.agents.workload import AS_IT_IS, Stretch, build
from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.launch.setup.tiny_model import TinyModel
from dualpath_sgl.launch.setup.tiny_model import build as build_model

TASK, RESULT, SECOND = "Mend the parser.", "\nIt failed: line 3.", "\nAll tests pass."
TEXTS = [
    {"timestamp": 9_000_000, "input": TASK + RESULT + SECOND, "output": "Done.", "session_id": "a"},
    {"timestamp": 1_000_000, "input": TASK, "output": "I look first.", "session_id": "a"},
    {"timestamp": 2_000_000, "input": "Another task.", "output": "Fine.", "session_id": "b"},
    {"timestamp": 4_500_000, "input": TASK + RESULT, "output": "Now I mend it.", "session_id": "a"},
    {"timestamp": 9_500_000, "input": "Summary: it works.", "output": "Good.", "session_id": "a"},
]
REQUESTS = [
    {"timestamp": 0, "input_length": 1200, "output_length": 6, "hash_ids": [0, 1, 2]},
    {"timestamp": 500, "input_length": 512, "output_length": 4, "hash_ids": [7]},
    {"timestamp": 2500, "input_length": 1600, "output_length": 9, "hash_ids": [0, 1, 5, 6]},
]


def lines(folder: Path, documents: list, name: str = "trace.jsonl") -> Path:
    file = folder / name
    file.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return file


def words(text: str) -> int:
    return len(text)


def test_lines_in_any_order_become_sessions_whose_turns_add_what_is_new(tmp_path):
    lines(tmp_path, TEXTS)
    first, second = load_text_sessions(tmp_path)
    assert (first.id, second.id) == ("a", "b")
    assert [turn.text for turn in first.turns] == [TASK, RESULT, SECOND, "Summary: it works."]
    assert [turn.continues for turn in first.turns] == [False, True, True, False]
    assert [turn.think_s for turn in first.turns] == [0.0, 3.5, 4.5, 0.5]
    assert first.turns[1].output == "Now I mend it."


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"timestamp": "now"}, "timestamp"),
        ({"timestamp": -1}, "timestamp"),
        ({"input": ""}, "input"),
        ({"output": None}, "output"),
        ({"session_id": "a\nb"}, "session_id"),
        ({"input": 5}, "input"),
    ],
)
def test_a_wrong_text_line_is_told_with_file_line_and_field(tmp_path, change, told):
    file = lines(tmp_path, [TEXTS[0], TEXTS[1] | change])
    with pytest.raises(EvalError, match=f"{file.name}:2: field {told}"):
        load_text_sessions(file)


def test_a_line_that_is_no_json_and_an_empty_trace_are_told(tmp_path):
    file = lines(tmp_path, [TEXTS[0]])
    file.write_text(file.read_text() + "\n{'a': 1}\n")
    with pytest.raises(EvalError, match=r"trace.jsonl:3: not JSON"):
        load_text_sessions(file)
    (tmp_path / "none").mkdir()
    for missing in (tmp_path / "none", tmp_path / "nowhere"):
        with pytest.raises(EvalError, match="give"):
            load_text_sessions(missing)


def test_full_text_is_cut_to_fit_and_answers_get_the_length_of_the_traces(tmp_path):
    sessions = load_text_sessions(lines(tmp_path, TEXTS))
    whole = chat.build(
        sessions, agents=2, turns=None, max_context_tokens=4000, page_size=4, count=words, stretch=AS_IT_IS
    )
    assert whole.factor == 1 and whole.requests == 5
    assert [turn.output_tokens for turn in whole.sessions[0].turns] == [13, 14, 5, 5]
    assert [turn.text for turn in whole.sessions[0].turns] == [turn.text for turn in sessions[0].turns]
    cut = chat.build(
        sessions, agents=2, turns=3, max_context_tokens=175, page_size=4, count=words, stretch=AS_IT_IS
    )
    assert cut.factor < 1 and cut.longest_tokens <= 175
    assert all(
        sessions[0].turns[i].text.startswith(turn.text) for i, turn in enumerate(cut.sessions[0].turns)
    )
    with pytest.raises(EvalError, match="max context is 100 tokens"):
        chat.build(
            sessions, agents=1, turns=3, max_context_tokens=100, page_size=4, count=words, stretch=AS_IT_IS
        )


def test_agents_and_seeds_share_nothing_of_a_session_that_is_used_again(tmp_path):
    sessions = load_text_sessions(lines(tmp_path, TEXTS))
    built = chat.build(
        sessions,
        agents=5,
        turns=None,
        max_context_tokens=4000,
        page_size=4,
        count=words,
        stretch=Stretch(2, 1),
    )
    assert [session.id for session in built.sessions] == ["a", "b", "a#1", "b#1", "a#2"]
    assert built.sessions[0].turns[1].text == RESULT * 2
    asked = [
        talk.ask().body["messages"][0]["content"]
        for seed in (1, 2)
        for talk in (ChatTalk(session, 4, seed) for session in built.sessions)
    ]
    assert len({text[:4] for text in asked}) == 10 and all(len(text.splitlines()[0]) == 16 for text in asked)
    assert asked[0].endswith(TASK) and asked[2].endswith(TASK)


def test_a_chat_holds_what_was_really_answered_and_expects_only_what_was_computed(tmp_path):
    sessions = load_text_sessions(lines(tmp_path, TEXTS))
    built = chat.build(
        sessions, agents=1, turns=None, max_context_tokens=4000, page_size=4, count=words, stretch=AS_IT_IS
    )
    talk = ChatTalk(built.sessions[0], page_size=4, seed=1)
    asked = []
    for _ in range(4):
        question = talk.ask()
        asked.append(question)
        reply = talk.reply()
        for piece in ("so", " be it"):
            reply.take({"choices": [{"delta": {"content": piece}}]})
        usage = {"prompt_tokens": 50, "completion_tokens": question.output_tokens}
        reply.take({"choices": [], "usage": usage | {"prompt_tokens_details": {"cached_tokens": 8}}})
        assert (reply.answer, reply.arrived, reply.cached_tokens) == ("so be it", 2, 8)
        talk.answered(reply)
    messages = [question.body["messages"] for question in asked]
    assert [message["role"] for message in messages[2]] == ["user", "assistant", "user", "assistant", "user"]
    assert messages[1][1]["content"] == "so be it" and messages[1][2]["content"] == RESULT
    assert len(messages[3]) == 1, "a prompt that does not continue begins anew"
    assert [question.hit_tokens for question in asked] == [0, 60, 60, 0]
    assert asked[0].body["max_tokens"] == 13 and asked[0].body["ignore_eos"] is True


def test_texts_are_counted_with_the_models_tokenizer(tmp_path):
    assert chat.counter(build_model(TinyModel()))("four") == 4
    with pytest.raises(EvalError, match=r"tokenizer.json"):
        chat.counter(tmp_path)


def test_fast25_requests_that_share_their_first_block_are_one_session(tmp_path):
    sessions = load_mooncake(lines(tmp_path, REQUESTS))
    assert [len(session.requests) for session in sessions] == [2, 1]
    assert [request.think_s for request in sessions[0].requests] == [0.0, 2.5]
    workload = build(sessions, agents=2, turns=None, max_context_tokens=5000, page_size=16)
    second = workload.sessions[0].turns[1]
    assert (second.parent, second.kept_tokens, second.prompt_tokens) == (0, 1024, 1600)
    assert second.think_s == 2.5


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"timestamp": -5}, "field timestamp"),
        ({"input_length": 0}, "field input_length"),
        ({"output_length": "many"}, "field output_length"),
        ({"hash_ids": [1]}, "hash_ids has 1 ids"),
        ({"hash_ids": ["x", "y", "z"]}, "field hash_ids.0"),
    ],
)
def test_a_wrong_fast25_line_is_told_with_file_line_and_field(tmp_path, change, told):
    file = lines(tmp_path, [REQUESTS[1], REQUESTS[0] | change])
    with pytest.raises(EvalError, match=f"{file.name}:2: {told}"):
        load_mooncake(file)
    with pytest.raises(EvalError, match="is a directory"):
        load_mooncake(tmp_path)
