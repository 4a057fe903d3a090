"""What the router understands of a request's body."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualpath_sgl.router.fleet.engines import Engine
from dualpath_sgl.router.fleet.errors import BadRequest
from dualpath_sgl.router.request import ClientRequest, prompt_tokens
from scheduler_svc.wire.protocol import Role

LONG = "word" * 100


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"input_ids": [1, 2, 3]}, 3),
        ({"input_ids": [[1, 2, 3], [4]]}, 4),
        ({"text": LONG}, 100),
        ({"text": [LONG, LONG]}, 200),
        ({"prompt": LONG}, 100),
        ({"messages": [{"role": "system", "content": LONG}, {"role": "user", "content": LONG}]}, 200),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": LONG}]}]}, 100),
        ({"messages": [{"content": None, "tool_calls": [{"function": {"arguments": LONG}}]}]}, 100),
        ({"messages": [{"content": "äöü" * 4}]}, 6),
        ({"system": LONG, "messages": [{"role": "user", "content": LONG}]}, 200),
        ({"system": [{"type": "text", "text": LONG}], "messages": []}, 100),
        ({"messages": [{"content": [{"type": "tool_result", "content": [{"text": LONG}]}]}]}, 100),
        ({"input": LONG, "instructions": LONG}, 200),
        (
            {"input": [{"role": "user", "content": LONG}, {"type": "function_call_output", "output": LONG}]},
            200,
        ),
        ({"messages": "nonsense", "temperature": 1}, 2),
        ({"input_ids": []}, 0),
        ({}, 0),
    ],
)
def test_the_prompts_size_is_estimated(body, expected):
    assert prompt_tokens(body) == expected


def test_tool_definitions_are_part_of_the_prompt():
    with_tools = {"messages": [], "tools": [{"function": {"description": LONG}}]}
    assert prompt_tokens(with_tools) >= 100


def request(headers: dict | None = None, **body) -> ClientRequest:
    return ClientRequest("/generate", headers or {}, orjson.dumps(body))


def test_the_header_names_the_session_before_the_body_does():
    assert request({"X-Session-Id": "a"}, session_id="b").session_id == "a"
    assert request(session_id="b").session_id == "b"
    assert request(session_params={"id": "c"}).session_id == "c"
    assert request(session_params=None, session_id="").session_id is None
    assert len(request(session_id="x" * 1000).session_id) == 256


@pytest.mark.parametrize(
    ("path", "body", "wants"),
    [
        ("/generate", {"return_logprob": True}, True),
        ("/generate", {"return_logprob": True, "stream": True}, False),
        ("/generate", {"return_logprob": True, "logprob_start_len": -1, "stream": True}, False),
        ("/generate", {"return_logprob": True, "logprob_start_len": 0, "stream": True}, True),
        ("/generate", {"return_logprob": True, "token_ids_logprob": [1], "stream": True}, True),
        (
            "/generate",
            {"text": ["a", "b"], "return_logprob": True, "logprob_start_len": [-1, 5], "stream": True},
            True,
        ),
        ("/generate", {"logprob_start_len": 0}, False),
        ("/generate", {"return_logprob": False}, False),
        ("/generate", {"echo": True, "logprobs": 2}, False),
        ("/v1/completions", {"echo": True, "logprobs": 2}, True),
        ("/v1/completions", {"echo": True, "logprobs": 0}, False),
        ("/v1/completions", {"logprobs": 2}, False),
        ("/v1/completions", {"return_logprob": True}, False),
        ("/v1/chat/completions", {"return_logprob": True, "logprobs": True, "top_logprobs": 2}, False),
    ],
)
def test_a_stream_waits_for_the_prefill_engine_only_where_it_holds_the_prompts_log_probabilities(
    path, body, wants
):
    assert ClientRequest(path, {}, orjson.dumps(body)).wants_logprobs is wants


def test_engines_get_everything_the_client_said_and_the_bootstrap_of_the_prefill_engine():
    prefill = Engine(Role.PREFILL, "http://[fd00::7]:30000", 8998, listed=True)
    assert orjson.loads(request(text="hello", seed=2**60).body_for(prefill, 2**63 - 1)) == {
        "text": "hello",
        "seed": 2**60,
        "bootstrap_host": "[fd00::7]",
        "bootstrap_port": 8998,
        "bootstrap_room": 2**63 - 1,
    }


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["content", "text", "function", "arguments", "id"]), inner, max_size=3
        )
    ),
    max_leaves=10,
)
fields = st.sampled_from(["input_ids", "text", "prompt", "messages", "tools", "session_id", "session_params"])


@given(st.dictionaries(fields, anything, max_size=4))
def test_a_strange_body_is_passed_on_or_refused(body):
    try:
        found = request(**body)
    except BadRequest:
        return
    assert found.prompt_tokens >= 0
    assert found.session_id is None or 1 <= len(found.session_id) <= 256


@given(st.binary(max_size=200))
def test_bytes_are_a_request_or_a_bad_request(content):
    try:
        ClientRequest("/generate", {}, content)
    except BadRequest as refusal:
        assert refusal.status == 400


def test_a_prompt_nested_without_end_is_counted_as_nothing():
    assert ClientRequest("/generate", {}, b'{"text":' + b"[" * 900 + b"]" * 900 + b"}").prompt_tokens == 0
