"""What SGLang would not answer gets a 400 at once; SGLang's own code says which requests those are."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from router_world import World

from dualpath_sgl.router.fleet.engines import Engine
from dualpath_sgl.router.fleet.errors import BadRequest
from dualpath_sgl.router.pairing import Pair, PlacedBy
from dualpath_sgl.router.request import ClientRequest
from scheduler_svc.wire.protocol import Role

PATHS = ("/generate", "/v1/completions", "/v1/chat/completions")
NO_NUMBER = ["2", "1", 2.0, 0, -1, 0.5, None, [2], {"n": 2}, "many", 129, 2**53]


def request(path: str = "/generate", **body) -> ClientRequest:
    return ClientRequest(path, {}, orjson.dumps({"text": "hello", "prompt": "hello"} | body))


def refusal(path: str = "/generate", **body) -> str:
    with pytest.raises(BadRequest) as refused:
        request(path, **body)
    assert refused.value.status == 400
    return str(refused.value)


@pytest.mark.parametrize("path", PATHS[1:])
@pytest.mark.parametrize("n", NO_NUMBER, ids=repr)
def test_a_number_of_samples_that_is_none_is_refused_with_field_value_and_remedy(path, n):
    said = refusal(path, n=n)
    assert said.startswith(f"n is {n!r}: ") and "whole number from 1 to 128" in said


@pytest.mark.parametrize("n", NO_NUMBER, ids=repr)
@pytest.mark.parametrize("text", ["one", ["two", "prompts"]])
def test_generate_names_the_sampling_parameters_that_hold_it(text, n):
    assert refusal(text=text, sampling_params={"n": n}).startswith(f"sampling_params.n is {n!r}: ")
    said = refusal(text=text, sampling_params=[{"n": 1}, {"n": n}])
    assert said.startswith(f"sampling_params[1].n is {n!r}: ")


def test_samples_are_counted_where_sglang_counts_them():
    for path in PATHS[1:]:
        assert request(path).samples == request(path, n=1).samples == 1
        assert request(path, n=3).samples == 3
    assert request(sampling_params={"n": 2}).samples == 2
    assert request(text=["a", "b"], sampling_params=[{"n": 4}, {"n": 4}]).samples == 4
    # SGLang itself takes no notice of these.
    assert request(n=2).samples == 1
    assert request("/v1/completions", best_of=3, sampling_params={"n": 2}).samples == 1
    assert request("/v1/messages", n="x").samples == 1


def test_custom_labels_are_refused_where_an_engine_takes_them_from_the_body():
    assert "custom_labels is {'team': 'a'}" in refusal(custom_labels={"team": "a"})
    request(custom_labels={})
    request(custom_labels=None)
    request("/v1/completions", custom_labels={"team": "a"})


def test_negative_token_ids_are_refused():
    assert "token id is -1" in refusal(text=None, input_ids=[1, -1])
    assert "token id is -7" in refusal(text=None, input_ids=[[1], [2, -7]])
    assert "token id is -1" in refusal("/v1/completions", prompt=[-1])
    request(text=None, input_ids=[[0, 1], [2]])


def test_a_long_value_is_not_repeated_to_its_end():
    assert len(refusal(custom_labels={"a": "b" * 1000})) < 500


@pytest.mark.parametrize("path", PATHS)
def test_through_the_router_it_is_an_answer_at_once_and_no_engine_sees_it(world: World, path):
    router = world.placing_router()
    body = {"sampling_params": {"n": 0}} if path == "/generate" else {"n": 0, "prompt": "a"}
    answer = router.ask(path, stream=True, **body)
    assert answer.status == 400
    assert answer.json["error"]["type"] == "bad_request"
    assert not any(engine.seen for engine in world.engines.values())


def test_several_samples_go_to_engines_that_the_scheduler_has_named(world: World):
    router = world.placing_router()
    world.wait_until_placed(router)
    assert router.ask("/v1/chat/completions", n=3).status == 200
    seen = [one.body for engine in world.engines.values() for one in engine.seen]
    assert [body["n"] for body in seen] == [3, 3]
    assert len({body["bootstrap_room"] for body in seen}) == 1


def test_several_samples_are_refused_while_nobody_knows_whether_the_engines_run_dualpath():
    pair = Pair(*(Engine(role, "http://a:1", None, listed=True) for role in Role), 7, PlacedBy.ROUTER)
    assert not pair.runs_dualpath
    pair.prefill.registered = True
    assert not pair.runs_dualpath
    pair.decode.registered = True
    assert pair.runs_dualpath


class SglangIntake:
    """SGLang's way of a `/generate` body from HTTP to its scheduler process, without the processes."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from pydantic import TypeAdapter
            from sglang.srt.entrypoints.api_contract import generate_contract_error
            from sglang.srt.managers import io_struct, tokenizer_manager
            from sglang.srt.sampling.sampling_params import SamplingParams
        self._body = TypeAdapter(io_struct.GenerateReqInput)
        self._contract_error = generate_contract_error
        self._encode, self._decode = io_struct.msgpack_encode, io_struct.msgpack_decode
        self._tokenized = tokenizer_manager.TokenizerManager._create_tokenized_object
        self._manager = SimpleNamespace(
            preferred_sampling_params=None,
            sampling_params_class=SamplingParams,
            tokenizer=SimpleNamespace(encode=lambda text, **_: [1] * len(text)),
            model_config=SimpleNamespace(vocab_size=1000),
            tokenized_generate_req_type=io_struct.TokenizedGenerateReqInput,
            rid_to_state=AnyRequest(),
        )

    def frames(self, body: dict) -> list[bytes]:
        """What its scheduler would be sent.  Any exception: SGLang answers the client."""
        if error := self._contract_error(body):
            raise ValueError(error)
        request = self._body.validate_python(body | {"bootstrap_host": "p", "bootstrap_room": 1})
        request.normalize_batch_and_arguments()
        count = 1 if request.is_single else request.batch_size
        parts = [request] if request.is_single else [request[index] for index in range(count)]
        frames = []
        for part in parts:
            tokenized = self._tokenized(self._manager, part, "text", [1, 2])
            tokenized.time_stats = None
            frames.append(self._encode(tokenized))
        return frames

    def ends(self, frame: bytes) -> bool:
        """Whether the scheduler process ends, as it does when it cannot read a message."""
        try:
            self._decode(frame)
        except ValueError:
            return True
        return False


class AnyRequest(dict):
    """The manager's record of requests, of which nothing is needed."""

    def __missing__(self, rid: str) -> SimpleNamespace:
        return SimpleNamespace(time_stats=SimpleNamespace(set_tokenize_finish_time=lambda: None))


@pytest.fixture(scope="module")
def sglang() -> Iterator[SglangIntake]:
    intake = SglangIntake()
    with pytest.MonkeyPatch.context() as patched:
        # It alone asks for a server's configuration.
        patched.setattr("sglang.srt.managers.tokenizer_manager._validate_watermark_request", lambda _: None)
        yield intake


ENDING = [
    {"return_logprob": [True]},
    {"return_logprob": True, "logprob_start_len": [0]},
    {"return_logprob": True, "top_logprobs_num": [1]},
    {"return_sampling_mask": [True]},
    {"return_sampling_mask": True, "sampling_logprobs_mode": ["selected"]},
    {"return_hidden_states": [True]},
    {"lora_path": ["x"]},
    {"lora_id": ["x"]},
    {"custom_logit_processor": ["x"]},
    {"text": None, "input_ids": [1, 2], "top_logprobs_num": [1]},
    {"text": None, "input_ids": [1, 2], "prompt": ["a", "b"], "top_logprobs_num": [1]},
    {"sampling_params": {"custom_params": [1]}},
    {"sampling_params": {"custom_params": "x"}},
    {"sampling_params": {"custom_params": {"a": [{"b": 1}]}}},
    {"text": ["a"], "sampling_params": [{"custom_params": {"a": {"b": {"c": 1}}}}]},
    {"session_params": {"id": 5}},
    {"session_params": {"rid": 5}},
    {"session_params": {"id": "a", "offset": "x"}},
    {"session_params": {"id": "a", "offset": 1.5}},
    {"session_params": {"id": "a", "replace": 1}},
    {"session_params": {"id": "a", "drop_previous_output": "x"}},
    {"positional_embed_overrides": 5},
]


@pytest.mark.parametrize("body", ENDING, ids=str)
def test_a_request_that_ends_sglangs_scheduler_process_is_refused(sglang, body):
    assert any(sglang.ends(frame) for frame in sglang.frames({"text": "hello"} | body))
    refusal(**body)


@pytest.mark.parametrize(
    "body",
    [
        {"text": ["a", "b"], "return_logprob": [True, False], "top_logprobs_num": [1, 2]},
        {"text": None, "input_ids": [[1], [2, 3]], "logprob_start_len": [0, 0], "return_logprob": True},
        {"sampling_params": {"custom_params": {"a": [1, None, "x"], "b": {"c": 2.5}}}},
        {"session_params": {"id": "a", "offset": 3, "replace": True}},
        {"session_params": {}},
        {"rid": "a", "priority": 3, "stream": True},
        {"return_logprob": True, "token_ids_logprob": [1, 2]},
    ],
    ids=str,
)
def test_a_request_that_sglang_takes_is_taken(sglang, body):
    assert not any(sglang.ends(frame) for frame in sglang.frames({"text": "hello"} | body))
    request(**body)


@pytest.mark.parametrize("path", PATHS)
def test_session_and_custom_parameters_are_looked_at_on_every_path(path):
    refusal(path, session_params={"id": 5})
    custom = {"custom_params": {"a": [[]]}}
    refusal(path, **({"sampling_params": custom} if path == "/generate" else custom))


def test_a_field_for_another_path_does_not_make_one_prompt_a_batch():
    refusal("/v1/chat/completions", text=["a", "b"], lora_path=["x", "y"])
    refusal("/v1/completions", text=["a", "b"], prompt="a", lora_path=["x", "y"])
    request("/v1/completions", prompt=["a", "b"], lora_path=["x", "y"])


words = st.text(max_size=3)
numbers = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False)
anything = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2),
)


def some(*names: str) -> st.SearchStrategy[dict]:
    return st.dictionaries(st.sampled_from(names), anything, max_size=2)


parameters = some("n", "max_new_tokens", "stop", "custom_params", "stream_interval", "logit_bias", "regex")
fields = st.fixed_dictionaries(
    {"text": words | st.lists(words, max_size=2)},
    optional={
        "sampling_params": parameters | st.lists(parameters, max_size=2),
        "session_params": some("id", "rid", "offset", "replace"),
        **dict.fromkeys(
            (
                *("return_logprob", "logprob_start_len", "top_logprobs_num", "return_hidden_states"),
                *("priority", "extra_key", "positional_embed_overrides", "lora_id", "rid"),
            ),
            anything,
        ),
    },
)


@settings(max_examples=300, deadline=None)
@given(fields)
def test_whatever_passes_router_and_sglangs_own_checks_its_scheduler_can_read(sglang, body):
    try:
        request(**body)
        frames = sglang.frames(body)
    except Exception:
        return  # somebody answers the client
    assert not any(sglang.ends(frame) for frame in frames)
