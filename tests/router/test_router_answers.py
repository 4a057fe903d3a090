"""What the router understands of engines' answers."""

from __future__ import annotations

from itertools import pairwise

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualpath_sgl.router.answers import LogprobMerger, Problem, merge_logprobs, problem_in


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
        (b"not JSON", None),
        (b"", None),
    ],
)
def test_errors_inside_an_answer_are_found(content, expected):
    assert problem_in(content) == expected


def test_the_prompts_log_probabilities_come_before_the_answers():
    merged = merge_logprobs(orjson.dumps(logprobs(1, 2)), orjson.dumps(logprobs(3, text="a")))
    assert orjson.loads(merged) == logprobs(1, 2, 3, text="a")


def test_each_member_of_a_batch_gets_its_own():
    prefill, decode = [logprobs(1), logprobs(2)], [logprobs(3), logprobs(4)]
    assert orjson.loads(merge_logprobs(orjson.dumps(prefill), orjson.dumps(decode))) == [
        logprobs(1, 3),
        logprobs(2, 4),
    ]


def test_an_answer_without_log_probabilities_stays_as_it_is():
    assert orjson.loads(merge_logprobs(b'{"text": "x"}', b'{"text": "y"}')) == {"text": "y"}


@given(st.lists(st.integers(min_value=0, max_value=200), max_size=8))
def test_a_stream_is_merged_event_by_event_whatever_its_chunks(cuts):
    merger = LogprobMerger(stream(logprobs(1, index=0), logprobs(2, index=1)))
    content = stream(logprobs(3, index=0), logprobs(4, index=1), logprobs(5, index=0))
    edges = sorted({0, len(content), *(min(cut, len(content)) for cut in cuts)})
    merged = b"".join(merger.feed(content[a:b]) for a, b in pairwise(edges))
    assert merged == stream(logprobs(1, 3, index=0), logprobs(2, 4, index=1), logprobs(1, 5, index=0))
