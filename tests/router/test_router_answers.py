"""What the router understands of engines' answers."""

from __future__ import annotations

from itertools import pairwise

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualpath_sgl.router.answers.dialects import error_body, error_events
from dualpath_sgl.router.answers.logprobs import StreamJoiner, join
from dualpath_sgl.router.answers.problems import Problem, problem_in
from dualpath_sgl.router.fleet.errors import BadRequest, NoEngine


def stream(*events: dict) -> bytes:
    return b"".join(b"data: " + orjson.dumps(event) + b"\n\n" for event in events) + b"data: [DONE]\n\n"


def logprobs(*values: int, **more) -> dict:
    return {"meta_info": {"input_token_logprobs": list(values)}} | more


ABORT = {"meta_info": {"finish_reason": {"type": "abort", "status_code": 503, "message": "timed out"}}}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (orjson.dumps({"text": "fine", "meta_info": {"finish_reason": {"type": "length"}}}), None),
        (stream({"text": "fine"}, {"choices": [], "error": None}), None),
        (orjson.dumps(ABORT), Problem(503, "timed out")),
        (orjson.dumps([{"text": "fine"}, ABORT]), Problem(503, "timed out")),
        (stream({"text": ""}, ABORT), Problem(503, "timed out")),
        (stream({"error": {"message": "too long", "code": 400}}), Problem(400, "too long")),
        (stream({"error": {"message": "broken", "code": "internal"}}), Problem(500, "broken")),
        (stream({"error": "broken"}), Problem(500, "broken")),
        (
            b"event: error\n"
            + stream({"type": "error", "error": {"type": "api_error", "message": "broken"}}),
            Problem(500, "broken"),
        ),
        (
            orjson.dumps(
                {"type": "error", "error": {"type": "invalid_request_error", "message": "too long"}}
            ),
            Problem(400, "too long"),
        ),
        (
            b"event: response.failed\n" + stream({"response": {"error": {"message": "broken"}}}),
            Problem(500, "broken"),
        ),
        (orjson.dumps({"id": "resp_1", "error": None, "output": []}), None),
        (b"not JSON", None),
        (b"", None),
    ],
)
def test_errors_inside_an_answer_are_found(content, expected):
    assert problem_in(content) == expected


GENERATE, COMPLETIONS = "/generate", "/v1/completions"


def test_the_prompts_log_probabilities_come_before_the_answers():
    joined = join(GENERATE, orjson.dumps(logprobs(1, 2)), orjson.dumps(logprobs(3, text="a")))
    assert orjson.loads(joined) == logprobs(1, 2, 3, text="a")


def test_each_member_of_a_batch_gets_its_own():
    prefill, decode = [logprobs(1), logprobs(2)], [logprobs(3), logprobs(4)]
    assert orjson.loads(join(GENERATE, orjson.dumps(prefill), orjson.dumps(decode))) == [
        logprobs(1, 3),
        logprobs(2, 4),
    ]


def test_an_answer_without_log_probabilities_stays_as_it_is():
    assert orjson.loads(join(GENERATE, b'{"text": "x"}', b'{"text": "y"}')) == {"text": "y"}
    choice = orjson.dumps({"choices": [{"index": 0, "text": "y"}]})
    assert orjson.loads(join(COMPLETIONS, b'{"choices": []}', choice)) == orjson.loads(choice)


def test_whatever_is_told_of_the_prompt_comes_from_the_prefill_engine():
    prefill = {
        "input_token_logprobs": [1, 2],
        "input_top_logprobs": [[1], [2]],
        "input_token_ids_logprobs": [[3], [4]],
        "output_token_ids_logprobs": [[5]],
        "output_token_logprobs": [6],
    }
    decode = {
        "input_token_logprobs": [],
        "output_token_ids_logprobs": [[], [7]],
        "output_token_logprobs": [6, 8],
    }
    joined = join(GENERATE, orjson.dumps({"meta_info": prefill}), orjson.dumps({"meta_info": decode}))
    assert orjson.loads(joined)["meta_info"] == {
        "input_token_logprobs": [1, 2],
        "input_top_logprobs": [[1], [2]],
        "input_token_ids_logprobs": [[3], [4]],
        "output_token_ids_logprobs": [[5], [7]],
        "output_token_logprobs": [6, 8],
    }


@given(st.lists(st.integers(min_value=0, max_value=200), max_size=8))
def test_a_stream_is_merged_event_by_event_whatever_its_chunks(cuts):
    joiner = StreamJoiner(GENERATE, stream(logprobs(1, index=0), logprobs(2, index=1)))
    content = stream(logprobs(3, index=0), logprobs(4, index=1), logprobs(5, index=0))
    edges = sorted({0, len(content), *(min(cut, len(content)) for cut in cuts)})
    merged = b"".join(joiner.feed(content[a:b]) for a, b in pairwise(edges))
    assert merged == stream(logprobs(1, 3, index=0), logprobs(2, 4, index=1), logprobs(1, 5, index=0))


def choices(*tokens: str, index: int = 0) -> dict:
    probabilities = {"tokens": list(tokens), "token_logprobs": [len(token) for token in tokens]}
    return {"choices": [{"index": index, "logprobs": probabilities}]}


def test_a_completions_prompt_comes_before_its_answer_without_the_first_token_twice():
    joined = join(COMPLETIONS, orjson.dumps(choices("ab", "c", "d")), orjson.dumps(choices("d", "e")))
    assert orjson.loads(joined) == choices("ab", "c", "d", "e")


def test_a_streamed_completions_prompt_comes_with_each_choices_first_event_only():
    joiner = StreamJoiner(COMPLETIONS, stream(choices("a", "x"), choices("b", "y", index=1)))
    told = joiner.feed(stream(choices("x"), choices("y", index=1), choices("z")))
    assert told == stream(choices("a", "x"), choices("b", "y", index=1), choices("z"))


def test_a_choice_without_log_probabilities_yet_gets_the_prompts():
    joiner = StreamJoiner(COMPLETIONS, stream(choices("a", "x")))
    (event, done, _) = joiner.feed(stream({"choices": [{"index": 0, "logprobs": None}]})).split(b"\n\n")
    assert orjson.loads(event.removeprefix(b"data: ")) == choices("a")
    assert done == b"data: [DONE]"


def test_errors_have_the_form_that_the_client_of_the_path_reads():
    assert orjson.loads(error_body(NoEngine("later"), "/v1/chat/completions")) == {
        "error": {"message": "later", "type": "no_engine", "code": 503}
    }
    anthropic = {"type": "error", "error": {"type": "overloaded_error", "message": "later"}}
    assert orjson.loads(error_body(NoEngine("later"), "/v1/messages")) == anthropic
    kind, data, *_ = error_events(BadRequest("no"), "/v1/messages").split(b"\n")
    assert kind == b"event: error"
    assert orjson.loads(data.removeprefix(b"data: "))["error"]["type"] == "invalid_request_error"
    assert error_events(BadRequest("no"), "/generate").endswith(b"\n\ndata: [DONE]\n\n")
