"""Requests of SGLang's own class, as an engine of a pair takes them from clients."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput

from dualpath_sgl.intake import ROOMS, after_capacity_check, after_normalize, before_validate

ROOM = 700
MANAGER = SimpleNamespace(model_config=SimpleNamespace(vocab_size=200))


def taken(**fields) -> GenerateReqInput:
    request = GenerateReqInput(**{"bootstrap_host": "p", "bootstrap_port": 9000} | fields)
    request.normalize_batch_and_arguments()
    after_normalize(None, request)
    return request


def parts(request: GenerateReqInput) -> list[GenerateReqInput]:
    return [request[index] for index in range(request.batch_size)]


@pytest.mark.parametrize("prompt", [{"text": "a"}, {"input_ids": [1, 2]}])
def test_every_sample_is_a_request_with_a_room_and_a_name_of_its_own(prompt):
    request = taken(**prompt, sampling_params={"n": 3, "temperature": 0.5}, bootstrap_room=ROOM)
    assert (request.parallel_sample_num, request.batch_size, request.is_single) == (1, 3, False)
    samples = parts(request)
    assert [sample.bootstrap_room for sample in samples] == [ROOM, ROOM + 1, ROOM + 2]
    assert len({sample.rid for sample in samples}) == 3
    assert request.rid == [sample.rid for sample in samples]
    assert all(sample.sampling_params == {"n": 1, "temperature": 0.5} for sample in samples)
    assert all(
        (sample.text, sample.input_ids) == (samples[0].text, samples[0].input_ids) for sample in samples
    )


def test_samples_of_a_batch_come_prompt_by_prompt_as_in_sglangs_answers():
    request = taken(text=["a", "b"], sampling_params={"n": 2}, bootstrap_room=ROOM, rid=["x", "y"])
    assert [sample.text for sample in parts(request)] == ["a", "a", "b", "b"] == request.text
    assert [sample.rid for sample in parts(request)] == ["x_0", "x_1", "y_0", "y_1"] == request.rid
    rooms = [sample.bootstrap_room for sample in parts(request)]
    assert rooms == request.bootstrap_room and len(set(rooms)) == 4


def test_each_prompts_own_parameters_go_with_its_samples():
    parameters = [{"n": 2, "top_k": 1}, {"n": 2, "top_k": 2}]
    request = taken(text=["a", "b"], sampling_params=parameters, bootstrap_room=ROOM)
    assert [sample.sampling_params["top_k"] for sample in parts(request)] == [1, 1, 2, 2]


def test_rooms_that_a_router_gave_to_each_prompt_are_counted_on_from():
    last = ROOMS - 1
    request = taken(text=["a", "b"], sampling_params={"n": 2}, bootstrap_room=[ROOM, last])
    assert [sample.bootstrap_room for sample in parts(request)] == [ROOM, ROOM + 1, last, 0]


def test_both_engines_come_to_the_same_rooms():
    fields = {"text": ["a", "b"], "sampling_params": {"n": 3}, "bootstrap_room": [5, 90]}
    assert taken(**fields).bootstrap_room == taken(**fields, stream=True).bootstrap_room


@pytest.mark.parametrize(
    "fields",
    [
        {"text": "a", "bootstrap_room": ROOM},
        {"text": ["a", "b"], "bootstrap_room": ROOM},
        {"text": "a", "sampling_params": {"n": 1}, "bootstrap_room": ROOM},
        {"text": "a", "sampling_params": {"n": 2}},
        {"text": ["a", "b"], "sampling_params": {"n": 2}, "rid": ["x", "y"]},
    ],
    ids=str,
)
def test_anything_else_is_left_to_sglang(fields):
    request, untouched = GenerateReqInput(**fields), GenerateReqInput(**fields)
    for one in (request, untouched):
        one.rid = one.rid or "r"
        one.normalize_batch_and_arguments()
    after_normalize(None, request)
    assert request == untouched


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"input_ids": [1, 200]}, "token id 200: the model knows 0 to 199"),
        ({"input_ids": [5, -1]}, "token id -1"),
        ({"text": "a", "return_logprob": True, "top_logprobs_num": 129}, "at most 128"),
    ],
)
def test_what_would_end_an_engine_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        before_validate(MANAGER, taken(**fields, bootstrap_room=ROOM), None)


def test_what_an_engine_bears_is_taken():
    before_validate(MANAGER, taken(input_ids=[0, 199], bootstrap_room=ROOM), None)
    most = {"return_logprob": True, "top_logprobs_num": 128}
    before_validate(MANAGER, taken(text="a", **most, bootstrap_room=ROOM), None)
    # No pair: what a single server makes of it is its own affair.
    before_validate(MANAGER, taken(input_ids=[200]), None)
    before_validate(MANAGER, EmbeddingReqInput(text="a"), None)


def queue(streamed: list) -> SimpleNamespace:
    """Of a DE with 2,048 tokens in pages of 16."""
    streamer = SimpleNamespace(stream_output=lambda reqs, _: streamed.extend(reqs))
    return SimpleNamespace(
        token_to_kv_pool_allocator=SimpleNamespace(page_size=16),
        num_reserved_decode_tokens=512,
        max_total_num_tokens=2048,
        scheduler=SimpleNamespace(enable_hisparse=False, output_streamer=streamer),
        _uses_swa_tail_prealloc=lambda: False,
    )


def prompt_of(tokens: int, output_ids: tuple = ()) -> SimpleNamespace:
    return SimpleNamespace(origin_input_ids=[1] * tokens, output_ids=list(output_ids), return_logprob=False)


@pytest.mark.parametrize("tokens", [1537, 1990, 2048])
def test_a_prompt_that_could_never_be_admitted_is_answered_at_once(tokens):
    streamed: list = []
    assert after_capacity_check(False, queue(streamed), prompt_of(tokens)) is True
    (answered,) = streamed
    reason = answered.finished_reason.to_json()
    assert (reason["type"], reason["status_code"]) == ("abort", 400)
    assert f"{tokens} tokens" in reason["message"] and "--num-reserved-decode-tokens" in reason["message"]


def test_sglangs_own_decision_stands_for_all_others():
    streamed: list = []
    assert after_capacity_check(False, queue(streamed), prompt_of(1536)) is None
    assert after_capacity_check(True, queue(streamed), prompt_of(3000)) is None
    assert after_capacity_check(False, queue(streamed), prompt_of(1990, [5])) is None, (
        "it was admitted before"
    )
    assert not streamed
